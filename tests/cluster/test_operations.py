"""Processes that die between two writes, two drivers on one output root, and the operator's commands afterwards."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time

import pytest

from tests.support.runs import command, count, dataset, finish, records, render, start, write_config, write_manifest

PROMPTS = [f"prompt {i}" for i in range(6)]
# With all that a run may write, so that there is more to be left half done.
ADORNED = {"output": {"webdataset": True}, "media": {"poster": True}}
DEATHS = ["posters/", "data/", "commits/", "summary.json"]
DEADLINE_S = 60


def hv_batch(*arguments):
    return finish(start([sys.executable, "-m", "hv_batch", *map(str, arguments)]))


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def with_short_heartbeats(arguments):
    """The command with short heartbeat intervals."""
    program = (
        "from hv_batch.job.records import lease; lease.HEARTBEAT_S = 0.2; from hv_batch.cli.main import main; main()"
    )
    return [sys.executable, "-c", program, *arguments[3:]]


def wait_for(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never saw {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(ray_head, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "marks").mkdir()
    config, manifest = write_config(folder, folder / "marks", **ADORNED), write_manifest(folder, PROMPTS)
    code, text = render(config, manifest, folder / "out", ray_head[0])
    assert code == 0, text
    return folder / "out"


@pytest.mark.slow
def test_processes_that_die_between_two_writes(undisturbed, ray_head, tmp_path, marks):
    """P1, P2, P4: SIGKILL after a poster, a media, a record and the summary; nothing is rendered twice, bytes are
    equal."""
    config = write_config(tmp_path, marks, {"dies_after": DEATHS}, retries={"infra": 5}, **ADORNED)
    manifest, output = write_manifest(tmp_path, PROMPTS), tmp_path / "out"
    code, text = render(config, manifest, output, ray_head[0])
    assert code == -signal.SIGKILL, text
    died = {path.name.removeprefix("once-died-after-") for path in marks.glob("once-died-*")}
    assert died == {prefix.replace("/", "") for prefix in DEATHS}
    assert (output / "summary.json").exists()
    assert not (output / "_SUCCESS").exists()
    assert (output / "lease.json").exists(), "the killed driver cannot release it"
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 0, text
    assert "heartbeats are watched" not in text, "the holder ran on this machine and has ended"
    assert count(marks, "denoised") == dict.fromkeys(PROMPTS, 1)
    assert dataset(output) == dataset(undisturbed)
    for folder in ("webdataset", "posters"):
        assert files(output / folder) == files(undisturbed / folder)
    assert not (output / "lease.json").exists()
    assert hv_batch("diff", output, undisturbed)[0] == 0
    assert hv_batch("verify", output, "--deep")[0] == 0


@pytest.mark.slow
def test_a_damaged_root_is_repaired_by_one_command(undisturbed, ray_head, tmp_path, marks):
    """P2, P3: `verify --repair` renders exactly the faulty samples again; the bytes are the same as before."""
    config, output = write_config(tmp_path, marks, **ADORNED), tmp_path / "out"
    code, text = render(config, write_manifest(tmp_path, PROMPTS), output, ray_head[0])
    assert code == 0, text
    next(output.glob("data/*/s01-*")).write_bytes(b"?")
    next(output.glob("posters/*/s04-*")).unlink()
    (output / "data" / "shard-00001" / "metadata.parquet").unlink()
    assert hv_batch("verify", output)[0] == 3
    code, text = hv_batch("verify", output, "--repair", "--address", ray_head[0])
    assert code == 0, text
    assert "2 rendered" in text
    assert count(marks, "denoised") == {prompt: 1 + (prompt in ("prompt 1", "prompt 4")) for prompt in PROMPTS}
    assert dataset(output) == dataset(undisturbed)
    assert hv_batch("verify", output, "--deep")[0] == 0


@pytest.mark.slow
def test_two_drivers_on_one_root(undisturbed, ray_head, tmp_path, marks):
    """P1: the second driver is refused with the first one's name; with --take-over the first one stops and says why."""
    manifest, output = write_manifest(tmp_path, PROMPTS), tmp_path / "out"
    slow = write_config(tmp_path, marks, {"step_seconds": 30.0}, **ADORNED)
    first = start(with_short_heartbeats(command(slow, manifest, output, ray_head[0])))
    wait_for(lambda: count(marks, "encoded"), "an encoding")
    quick = write_config(tmp_path, marks, **ADORNED)
    code, text = render(quick, manifest, output, ray_head[0])
    assert code == 1, text
    assert f"process {first.pid}" in text
    assert "--take-over" in text
    assert "Traceback" not in text
    assert first.poll() is None, "the first did not notice"
    code, text = finish(start(command(quick, manifest, output, ray_head[0], "--steal")))
    assert code == 0, text
    code, text = finish(first)
    assert code == 1, text
    assert "was taken over by" in text
    assert dataset(output) == dataset(undisturbed)
    assert not (output / "lease.json").exists()


@pytest.mark.slow
def test_a_quarantined_sample_is_retried(undisturbed, ray_head, tmp_path, marks):
    """P5: after retry, the same command renders only that sample, and verify finds no fault."""
    config = write_config(tmp_path, marks, retries={"poison": 1})
    prompts = ["good 0", "bad !raise-denoise-once", "good 1"]
    manifest, output = write_manifest(tmp_path, prompts), tmp_path / "out"
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 3, text
    code, text = hv_batch("retry", output, "--class", "POISON", "--yes")
    assert code == 0, text
    assert "made to fail at denoise" in text
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 0, text
    assert count(marks, "denoised") == dict.fromkeys(prompts, 1)
    assert not records(output, "quarantine")
    code, text = hv_batch("verify", output, "--deep")
    assert code == 0, text
    assert "3 committed samples" in text


@pytest.mark.slow
def test_what_failed_is_rendered_again_by_one_command(ray_head, tmp_path, marks):
    """P2, P5: `run --failed-only` renders only the quarantined samples, though the run had finished; the
    records hold the earlier attempts. A sample that fails again is quarantined again, and nothing else is rendered."""
    prompts = ["good 0", "bad !raise-denoise-once", "good 1", "worse !raise-denoise"]
    config = write_config(tmp_path, marks, retries={"poison": 1})
    manifest, output = write_manifest(tmp_path, prompts), tmp_path / "out"
    arguments = (config, manifest, output, ray_head[0], "--failed-only")
    code, text = render(*arguments)
    assert code == 1, text
    assert "is not an output root" in text
    code, text = render(*arguments[:-1])
    assert code == 3, text
    code, text = render(*arguments)
    assert code == 3, text
    assert "released from quarantine: 2 samples" in text
    assert count(marks, "denoised") == dict.fromkeys(prompts[:3], 1)
    assert [failure["kind"] for failure in records(output)["s01"]["history"]] == ["POISON"]
    assert records(output, "quarantine")["s03"]["attempts"] == 2
    assert (output / "_SUCCESS").exists()
    assert hv_batch("verify", output, "--deep")[0] == 0
    code, text = render(*arguments, "--where", "id=s01")
    assert code == 1, text
    assert "No sample of the manifest matches id=s01" in text
    shutil.rmtree(output / "quarantine")
    (output / "retried" / "shard-00000" / "s03.json").unlink()
    code, text = render(*arguments)
    assert code == 0, text
    assert "nothing to render" in text


@pytest.mark.slow
def test_a_resume_takes_over_from_a_driver_that_hangs(undisturbed, ray_head, tmp_path, marks):
    """P1, P2: `resume --take-over` needs only the root; the driver that loses the lease stops and says why."""
    manifest, output = write_manifest(tmp_path, PROMPTS), tmp_path / "out"
    config = write_config(tmp_path, marks, {"hold_after": [2]}, **ADORNED)
    first = start(with_short_heartbeats(command(config, manifest, output, ray_head[0])))
    wait_for(lambda: count(marks, "steps"), "a step")
    code, text = hv_batch("resume", output, "--address", ray_head[0])
    assert code == 1, text
    assert f"process {first.pid}" in text
    second = start([sys.executable, "-m", "hv_batch", "resume", str(output), "--address", ray_head[0], "--steal"])
    code, text = finish(first)
    assert code == 1, text
    assert "was taken over by `hv-batch run`" in text
    (marks / "go-2").touch()
    code, text = finish(second)
    assert code == 0, text
    assert dataset(output) == dataset(undisturbed)
    assert not (output / "lease.json").exists()


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on(ray_head, tmp_path, marks):
    """P2: `resume` of a root whose run.json contains a removed key renders the pending samples, with one warning."""
    manifest, output = write_manifest(tmp_path, PROMPTS[:2]), tmp_path / "out"
    code, text = render(write_config(tmp_path, marks), manifest, output, ray_head[0], "--limit", "1")
    assert code == 0, text
    run = json.loads((output / "run.json").read_text())
    run["config"]["encoders"]["cache"] = "/shared/embeddings"
    (output / "run.json").write_text(json.dumps(run))
    code, text = hv_batch("resume", output, "--address", ray_head[0])
    assert code == 0, text
    assert text.count("warning: the config key encoders.cache is ignored") == 1
    assert count(marks, "denoised") == dict.fromkeys(PROMPTS[:2], 1)
    assert (output / "_SUCCESS").exists()
