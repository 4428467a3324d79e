"""decoders.placement: both placements give the same bytes, with and without failures (P3)."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import defaultdict

import pytest

from hv_batch.toy.checkpoint import write_toy_checkpoint
from tests.support.repository import ROOT
from tests.support.runs import (
    command,
    count,
    dataset,
    finish,
    records,
    render,
    start,
    table,
    wait_for,
    write_config,
    write_manifest,
)

# The default pause between two tries is too long for a test.
QUICK = "from hv_batch.job.scheduling import limits; limits.OUTAGE_PAUSE_S = 0.5"
IMPATIENT = f"{QUICK}; from hv_batch.cli.main import main; main()"

PROMPTS, WIDTHS = ["fox", "hare", "owl"], [64, 80, 96]
IN_GROUP = {"placement": "group"}


def manifest_in(folder):
    """Three videos of different sizes, and an image with guidance."""
    rows = [{"id": prompt, "prompt": prompt, "width": width} for prompt, width in zip(PROMPTS, WIDTHS, strict=True)]
    rows.append({"id": "heron", "prompt": "heron", "num_frames": 1, "cfg_scale": 2.0, "width": 112})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rendered(output):
    """A record without workers, durations and earlier failures."""
    own = {"places", "stages", "created_at", "attempts", "history"}
    return {
        key: {name: value for name, value in record.items() if name not in own}
        for key, record in records(output).items()
    }


def lives(marks):
    """The number of groups whose ranks have joined."""
    return sum(count(marks, "join-0-of-2").values())


def gpus(marks):
    """The ids of the GPUs that ranks and actors got, by incarnation."""
    found = defaultdict(list)
    path = marks / "gpus"
    for line in path.read_text().splitlines() if path.exists() else ():
        who, *ids = line.split()
        found[who] += ids
    return found


@pytest.fixture(scope="module")
def pooled(ray_head, tmp_path_factory):
    """The output root of a run whose decoders are a pool."""
    folder = tmp_path_factory.mktemp("pooled")
    marks = folder / "marks"
    marks.mkdir()
    code, text = render(write_config(folder, marks), manifest_in(folder), folder / "out", ray_head[0])
    assert code == 0, text
    return folder / "out"


@pytest.mark.slow
def test_groups_that_decode_give_the_bytes_of_decoders(pooled, ray_head, tmp_path, marks):
    """P3, P4: the same root, though rank 0 dies in a decode, rank 1 in another, and frames of a third are not finite.

    No denoise is repeated, and frames that are refused cost the sample a try and the group nothing.
    """
    faults = dict(zip(WIDTHS, ("kill-0", "kill-1", "nan"), strict=True))
    config, output = write_config(tmp_path, marks, {"decode_faults": faults}, decoders=IN_GROUP), tmp_path / "out"
    code, text = render(config, manifest_in(tmp_path), output, ray_head[0])
    assert code == 0, text
    assert dataset(output) == dataset(pooled)
    assert rendered(output) == rendered(pooled)
    assert count(marks, "denoised") == dict.fromkeys([*PROMPTS, "heron"], 1)
    failed = {key: [failure["kind"] for failure in record["history"]] for key, record in records(output).items()}
    assert failed == {"fox": ["INFRA"], "hare": ["INFRA"], "owl": ["POISON"], "heron": []}
    assert lives(marks) == 3
    assert all(record["places"]["decode"]["worker"].startswith("denoise-0") for record in records(output).values())
    assert not list((output / "latents").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("pool", "group"), ("group", "pool")])
def test_latents_are_decoded_wherever_they_were_denoised(pooled, ray_head, tmp_path, marks, first, then):
    """P2, P3: a run is killed before it decodes, and one of another placement commits what it left: the placement is
    not part of a run's identity.
    """
    (marks / "hold-decodes").touch()
    config, manifest, output = write_config(tmp_path, marks), manifest_in(tmp_path), tmp_path / "out"
    driver = start(command(config, manifest, output, ray_head[0], f"decoders.placement={first}"))
    wait_for(lambda: count(marks, "decoded"), "a decode")
    driver.send_signal(signal.SIGKILL)
    finish(driver)
    stored = {path.stem for path in (output / "latents").rglob("*.safetensors")}
    assert stored, "a decode began, so its latents were there"
    denoised = count(marks, "denoised")
    (marks / "hold-decodes").unlink()
    code, text = render(config, manifest, output, ray_head[0], f"decoders.placement={then}")
    assert code == 0, text
    assert dataset(output) == dataset(pooled)
    prompts = {record["params"]["prompt"] for key, record in records(output).items() if key in stored}
    assert {prompt: count(marks, "denoised")[prompt] for prompt in prompts} == {p: denoised[p] for p in prompts}


@pytest.mark.slow
def test_encoders_stay_when_their_group_is_rebuilt(pooled, ray_head, tmp_path, marks):
    """P3, P5: an encoder uses a GPU of a group and no two ranks share one; a rank dies, the encoder beside it keeps
    running, and the bytes are the same.
    """
    colocated = {"placement": "colocated", "gpus": 0.2}
    config = write_config(tmp_path, marks, {"hold_after": [3]}, encoders=colocated)
    output = tmp_path / "out"
    driver = start(command(config, manifest_in(tmp_path), output, ray_head[0]))
    wait_for(lambda: count(marks, "steps") and "encoder" in gpus(marks), "a denoise and an encoder")
    os.kill(int((marks / "pid-1").read_text()), signal.SIGKILL)
    (marks / "go-3").touch()
    code, text = finish(driver)
    assert code == 0, text
    assert dataset(output) == dataset(pooled)
    assert lives(marks) == 2
    held = gpus(marks)
    assert len(held["encoder"]) == 1, "one encoder, started once"
    for life in range(2):
        ranks = {held["rank-0"][life], held["rank-1"][life]}
        assert len(ranks) == 2, "two ranks on one GPU"
        assert set(held["encoder"]) <= ranks


@pytest.mark.slow
def test_an_outage_at_the_commit_costs_a_group_nothing(pooled, ray_head, tmp_path, marks):
    """P5: the output root refuses writes for a while, and the spool is disabled. The group keeps its weights, no sample
    is charged, and nothing is denoised twice.
    """
    (marks / "away").touch()
    without_spool = {"shard_size": 4, "spool_gib": 0}
    config = write_config(tmp_path, marks, {"root_goes_away": True}, decoders=IN_GROUP, output=without_spool)
    output = tmp_path / "out"
    _, _, *arguments = command(config, manifest_in(tmp_path), output, ray_head[0])
    driver = start([sys.executable, "-c", IMPATIENT, *arguments[1:]])
    wait_for(lambda: count(marks, "refused").total() > 1, "two commits that were refused")
    (marks / "away").unlink()
    code, text = finish(driver)
    assert code == 0, text
    assert "OUTAGE" in text
    assert dataset(output) == dataset(pooled)
    assert {record["attempts"] for record in records(output).values()} == {1}
    assert count(marks, "denoised") == dict.fromkeys([*PROMPTS, "heron"], 1)
    assert lives(marks) == 1


@pytest.mark.slow
def test_the_toy_model_decodes_the_same_in_a_group(ray_head, tmp_path):
    """P3: the real engine over gloo; a video of many tiles, decoded by two ranks, is that of one decoder."""
    base = write_toy_checkpoint(tmp_path / "toy")
    manifest = write_manifest(tmp_path, ["fox"], height=64, width=128, num_frames=21)
    overrides = [f"model.options.model_base={base}", "parallel.ulysses_degree=2", "parallel.ring_degree=1"]
    overrides += ["defaults.num_inference_steps=2", "model.options.vae_tile={spatial_px: 64, temporal_frames: 16}"]
    for placement in ("pool", "group"):
        arguments = (ROOT / "configs" / "fake_gpus_8rank.yaml", manifest, tmp_path / placement, ray_head[0])
        code, text = render(*arguments, *overrides, f"decoders.placement={placement}")
        assert code == 0, text
    assert len(table(tmp_path / "pool")) == 1
    assert dataset(tmp_path / "group") == dataset(tmp_path / "pool")
    assert rendered(tmp_path / "group") == rendered(tmp_path / "pool")
