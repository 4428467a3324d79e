"""Step checkpoints in whole runs on a real Ray: the steps that a lost rank or a short drain costs (P4)."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.runs import PROMPTS as UNDISTURBED
from tests.support.runs import (
    command,
    count,
    dataset,
    finish,
    records,
    render,
    start,
    videos,
    wait_for,
    write_config,
    write_manifest,
)

PROMPTS = ["fox", "hare"]
STEPS = 8


def manifest_in(folder):
    return write_manifest(folder, PROMPTS, num_inference_steps=STEPS)


def config_in(folder, marks, every, engine_options=None, **sections):
    return write_config(folder, marks, engine_options, groups={"checkpoint_every": every}, **sections)


def checkpoints(output):
    return list((output / "steps").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def without_checkpoints(ray_head, tmp_path_factory):
    """The dataset of PROMPTS without failures and checkpoints."""
    folder = tmp_path_factory.mktemp("without_checkpoints")
    marks = folder / "marks"
    marks.mkdir()
    code, text = render(config_in(folder, marks, every=0), manifest_in(folder), folder / "out", ray_head[0])
    assert code == 0, text
    assert not checkpoints(folder / "out")
    return dataset(folder / "out")


def assert_resumed(output, marks, reached, prompt=PROMPTS[0], steps=STEPS):
    """The failed try of the first prompt made `reached` steps; only the steps after its checkpoint were repeated."""
    record = records(output)["s00"]
    resumed_from = record["places"]["denoise"]["resumed_from_step"]
    made = {step: count(marks, "steps")[f"{prompt} {step}"] for step in range(1, steps + 1)}
    assert made == {step: 2 if resumed_from < step <= reached else 1 for step in range(1, steps + 1)}
    assert not checkpoints(output), "it is not needed any more"
    return record, resumed_from


@pytest.mark.slow
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(expected, ray_head, tmp_path, marks):
    """P4, P3: rank 0 dies by SIGKILL; the rebuilt group resumes from the checkpoint, and the bytes are the same."""
    config = config_in(tmp_path, marks, every=1, engine_options={"hold_after": [3]})
    output, prompt = tmp_path / "out", UNDISTURBED[0]
    driver = start(command(config, write_manifest(tmp_path, UNDISTURBED[:2]), output, ray_head[0]))
    wait_for(lambda: count(marks, "steps")[f"{prompt} 3"] and checkpoints(output), "a checkpoint and the third step")
    os.kill(int((marks / "pid-0").read_text()), signal.SIGKILL)
    (marks / "go-3").touch()
    code, text = finish(driver)
    assert code == 0, text
    record, resumed_from = assert_resumed(output, marks, 3, prompt, steps=4)
    assert resumed_from in (1, 2, 3)
    assert record["attempts"] == 2
    assert record["history"][0]["kind"] == "INFRA"
    assert len(videos(output)) == 2
    assert videos(output).items() <= expected


@pytest.mark.slow
def test_a_drain_that_is_too_short_leaves_a_checkpoint(without_checkpoints, ray_head, tmp_path, marks):
    """P4, P2: SIGTERM requests a checkpoint of the running denoise, and the same command resumes from it."""
    options = {"hold_after": [3, STEPS], "step_seconds": 0.3}
    config = config_in(tmp_path, marks, every=0, engine_options=options, timeouts={"drain_s": 4})
    output, manifest = tmp_path / "out", manifest_in(tmp_path)
    driver = start(command(config, manifest, output, ray_head[0]))
    wait_for(lambda: count(marks, "steps")["fox 3"], "the third step")
    driver.send_signal(signal.SIGTERM)
    wait_for(lambda: "stop requested" in driver.stdout.readline(), "the drain")
    (marks / "go-3").touch()  # the denoise goes on, and never ends
    code, text = finish(driver)
    assert code == 143, text
    assert not records(output)
    assert checkpoints(output)
    config = config_in(tmp_path, marks, every=0)
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 0, text
    record, resumed_from = assert_resumed(output, marks, reached=STEPS)
    assert 3 < resumed_from < STEPS
    assert record["attempts"] == 1, "a stop does not count against the sample"
    assert dataset(output) == without_checkpoints


@pytest.mark.slow
def test_checkpoints_that_cannot_be_written_disturb_nothing(without_checkpoints, ray_head, tmp_path, marks):
    """P4: a failed checkpoint does not affect the denoise; the record counts it."""
    output = tmp_path / "out"
    (output / "steps").mkdir(parents=True)
    (output / "steps" / "shard-00000").touch()  # where a folder should be
    config = config_in(tmp_path, marks, every=1)
    code, text = render(config, manifest_in(tmp_path), output, ray_head[0])
    assert code == 0, text
    assert all(record["places"]["denoise"]["checkpoints_failed"] > 0 for record in records(output).values())
    assert dataset(output) == without_checkpoints
