"""Whole runs on a real Ray with the fake engine, with and without failures."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from datetime import datetime, timedelta

import pytest

from hv_batch.job.event_log.reader import check_part, list_parts, read_events
from hv_batch.job.storage.store import Store
from tests.support.runs import (
    PROMPTS,
    command,
    count,
    dataset,
    finish,
    records,
    render,
    start,
    table,
    videos,
    wait_for,
    write_config,
    write_manifest,
)


def test_every_sample_is_committed_once(undisturbed):
    """P1: one record per sample, its media at the recorded key, shards sealed, summary and _SUCCESS written."""
    output = undisturbed / "out"
    found = records(output)
    assert list(found) == [f"s{i:02d}" for i in range(10)]
    assert all((output / record["file"]).stat().st_size == record["bytes"] for record in found.values())
    assert [row["id"] for shard in range(3) for row in table(output, shard)] == list(found)
    assert json.loads((output / "summary.json").read_text())["committed"] == 10
    assert (output / "_SUCCESS").exists()
    assert (output / "report" / "index.html").exists()
    assert not list((output / "latents").rglob("*.safetensors"))
    assert count(undisturbed / "marks", "denoised") == dict.fromkeys(PROMPTS, 1)


def test_a_record_holds_its_lineage(undisturbed):
    """Lineage: parameters, seed, plan, stages with their workers, versions and licence are in the commit record."""
    record = records(undisturbed / "out")["s03"]
    assert record["params"]["prompt"] == "prompt 3"
    assert record["params"]["height"] == 64
    assert set(record["stages"]) == {"encode", "denoise", "decode"}
    assert record["places"]["denoise"]["worker"].startswith("denoise-0")
    assert record["places"]["encode"]["tokens_lost"] == 0
    assert record["versions"]["torch"]
    assert record["licence"]


def test_what_the_driver_did_is_in_the_events(undisturbed):
    """Design 4: workers, their tasks, progress and the end of the run, in order and within seconds of the records."""
    (driver,) = read_events(Store(str(undisturbed / "out")))
    kinds = [event["kind"] for event in driver.events]
    assert (kinds[0], kinds[-1]) == ("run_started", "run_ended")
    assert driver.events[-1]["outcome"] == "finished"
    assert (driver.last("progress")["committed"], driver.last("progress")["pending"]) == (10, 0)
    for stage in ("encode", "denoise", "decode"):
        own = [event for event in driver.events if event.get("stage") == stage]
        states = [event["kind"] for event in own if event["worker"] == own[0]["worker"]]
        assert states[:3] == ["worker_asked", "worker_placed", "worker_ready"]
        work = [event for event in own if event["kind"] == "worker_work"]
        assert sum(event["samples"] for event in work) == 10
        assert all(event["since"] < event["at"] and event["seconds"] > 0 for event in work)
        assert all(event["nodes"] and event["gpus"] == 2.0 * (stage == "denoise") for event in work)
    found = records(undisturbed / "out").values()
    committed = [datetime.fromisoformat(record["created_at"]).timestamp() for record in found]
    assert driver.events[0]["at"] - 1 < min(committed)
    assert max(committed) < driver.events[-1]["at"] + 1


def test_a_finished_root_renders_nothing(undisturbed, ray_head):
    """P2: the same command over a finished output changes nothing and starts no actor."""
    before = dataset(undisturbed / "out")
    code, text = render(undisturbed / "config.yaml", undisturbed / "manifest.jsonl", undisturbed / "out", "127.0.0.1:1")
    assert code == 0, text
    assert "nothing to render" in text
    assert dataset(undisturbed / "out") == before
    assert sum(count(undisturbed / "marks", "denoised").values()) == 10


def test_a_finished_root_gets_back_a_summary_that_it_has_lost(undisturbed):
    """P2: the same command, and a resume, write summary.json again from the records and exit as before."""
    summary = undisturbed / "out" / "summary.json"
    before = json.loads(summary.read_text())
    summary.write_text("{")
    code, text = render(undisturbed / "config.yaml", undisturbed / "manifest.jsonl", undisturbed / "out", "127.0.0.1:1")
    assert code == 0, text
    assert "summary.json of " in text
    assert "missing or damaged; it is written again" in text
    after = json.loads(summary.read_text())
    assert after == {name: value for name, value in before.items() if name in after}
    assert after["committed"] == 10


@pytest.mark.slow  # test_short_chaos.py kills a driver, too
@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_sigkill_and_the_same_command_again(undisturbed, ray_head, tmp_path, marks, after):
    """P2, P3: a driver killed at any moment is resumed; nothing committed is rendered again, bytes are equal."""
    config = write_config(tmp_path, marks, {"step_seconds": 0.02})
    manifest, output = write_manifest(tmp_path, PROMPTS), tmp_path / "out"
    driver = start(command(config, manifest, output, ray_head[0]))
    wait_for(lambda: len(records(output)) >= after and (output / "run.json").exists(), f"{after} commits")
    driver.send_signal(signal.SIGKILL)
    finish(driver)
    store = Store(str(output))
    written = list_parts(store)
    assert written or after == 0, "the first part is written before the first sample"
    assert all(check_part(store, part) is None for part in written), "a part is written whole or not at all"
    committed = {record["params"]["prompt"] for record in records(output).values()}
    begun = count(marks, "denoised")
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 0, text
    assert all(count(marks, "denoised")[prompt] == begun[prompt] for prompt in committed)
    assert videos(output) == videos(undisturbed / "out")
    assert (output / "_SUCCESS").exists()
    assert [bool(each.last("run_ended")) for each in read_events(store)] == [False] * bool(written) + [True]


@pytest.mark.slow
def test_a_run_over_a_part_leaves_the_rest_to_the_next(undisturbed, ray_head, tmp_path, marks):
    """P2, P3: a selection is not part of the identity; the last command writes the summary; bytes are the same."""
    config, manifest = write_config(tmp_path, marks), write_manifest(tmp_path, PROMPTS)
    output = tmp_path / "out"
    for selection, done in ((["--where", "id=s09", "--where", "id=s02"], 2), (["--shards", "0,2", "--limit", "3"], 4)):
        code, text = render(config, manifest, output, ray_head[0], *selection)
        assert code == 0, text
        assert f"{10 - done} samples outside it are pending" in text
        assert json.loads((output / "report" / "report.json").read_text())["totals"]["pending"] == 10 - done
        assert len(records(output)) == done
        assert not (output / "_SUCCESS").exists()
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 0, text
    assert "checked before" in text
    assert count(marks, "denoised") == dict.fromkeys(PROMPTS, 1)
    assert dataset(output).keys() == dataset(undisturbed / "out").keys()
    assert (output / "_SUCCESS").exists()


@pytest.mark.slow
def test_a_run_continues_without_its_manifest(ray_head, tmp_path, marks):
    """P2: once the index is in the output root, a run does not need its manifest."""
    config, output = write_config(tmp_path, marks, {"step_seconds": 0.05}), tmp_path / "out"
    manifest = write_manifest(tmp_path, PROMPTS[:6])
    driver = start(command(config, manifest, output, ray_head[0]))
    wait_for((output / "plan" / "index.json").exists, "the index")
    manifest.unlink()
    code, text = finish(driver)
    assert code == 0, text
    assert len(records(output)) == 6


@pytest.mark.slow
def test_sigterm_drains_and_exits_143(ray_head, tmp_path, marks):
    """Exit codes: after SIGTERM running samples finish, the exit code is 143, and the same command resumes the run. The
    report exists while it runs, and says how it was stopped.
    """
    config, output = write_config(tmp_path, marks, {"step_seconds": 0.4}), tmp_path / "out"
    manifest = write_manifest(tmp_path, PROMPTS)
    at_once = "from hv_batch.runtime.driver import report_task; report_task.FIRST_S = 0.0"
    program = f"{at_once}; from hv_batch.cli.main import main; main()"
    driver = start([sys.executable, "-c", program, *command(config, manifest, output, ray_head[0])[3:]])
    report = output / "report" / "report.json"
    wait_for(lambda: count(marks, "denoised") and report.exists(), "a denoise and a report")
    assert json.loads(report.read_text())["running"] is True
    driver.send_signal(signal.SIGTERM)
    code, text = finish(driver)
    assert code == 143, text
    done = len(records(output))
    assert 1 <= done < len(PROMPTS)
    assert sum(count(marks, "denoised").values()) == done, "what was denoised was committed too"
    assert not (output / "_SUCCESS").exists()
    stopped = json.loads(report.read_text())
    assert (stopped["running"], stopped["finished"], stopped["totals"]["committed"]) == (False, False, done)
    assert f"report: {output}/report/index.html" in text
    (events,) = read_events(Store(str(output)))
    assert [event["kind"] for event in events.events if event["kind"].startswith(("drain", "run"))] == [
        *("run_started", "drain_started", "drain_ended", "run_ended"),
    ]
    assert events.events[-1]["outcome"] == "stopped"
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 0, text
    assert f"report so far: {output}/report/index.html" in text
    assert len(records(output)) == len(PROMPTS)
    assert sum(count(marks, "denoised").values()) == len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["--until", "--max-gpu-hours"])
def test_a_limit_ends_the_run_with_a_drain(ray_head, tmp_path, marks, limit):
    """`--until`, `--max-gpu-hours`: what is running is finished, nothing new is started, the exit code is 143, and the
    same command resumes the run.
    """
    drain_s = 20.0
    if limit == "--until":  # its drain begins now, or within a minute
        until = datetime.now() + timedelta(seconds=drain_s + 20)
        value = (until + timedelta(minutes=1)).strftime("%H:%M")
    else:  # two GPUs for about five seconds and the drain
        value = str(2 * (drain_s + 5.0) / 3600)
    config = write_config(tmp_path, marks, {"step_seconds": 0.3}, timeouts={"drain_s": drain_s})
    manifest, output = write_manifest(tmp_path, [f"prompt {i}" for i in range(200)]), tmp_path / "out"
    code, text = render(config, manifest, output, ray_head[0], limit, value)
    assert code == 143, text
    assert "no new samples are started" in text
    done = len(records(output))
    assert done < 200
    assert sum(count(marks, "denoised").values()) == done, "what was denoised was committed too"
    assert re.search(r"have reserved 0\.\d\d GPU hours", text)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(ray_head, tmp_path, marks):
    """Exit codes: a second signal ends the drain at once, and the same command still resumes the run."""
    config, output = write_config(tmp_path, marks, {"step_seconds": 5.0}), tmp_path / "out"
    driver = start(command(config, write_manifest(tmp_path, PROMPTS[:2]), output, ray_head[0]))
    wait_for(lambda: count(marks, "denoising"), "a denoise")  # of 20 s, which a drain would wait for
    driver.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    driver.send_signal(signal.SIGTERM)
    code, text = finish(driver, timeout=15)
    assert code == 143, text
    assert "stopped at once" in text
    assert not records(output)


def test_a_stop_ends_the_wait_for_nodes(ray_head, tmp_path, marks):
    """Exit codes: SIGTERM ends the wait for nodes, and no run.json is written."""
    config, output = write_config(tmp_path, marks, parallel={"ulysses_degree": 12}), tmp_path / "out"
    driver = start(command(config, write_manifest(tmp_path, PROMPTS[:1]), output, ray_head[0]))
    wait_for(lambda: "waiting for nodes" in driver.stdout.readline(), "the waiting")
    driver.send_signal(signal.SIGTERM)
    code, text = finish(driver, timeout=30)
    assert code == 143, text
    assert not (output / "run.json").exists()


@pytest.mark.slow
def test_a_poisoned_sample_is_quarantined(ray_head, tmp_path, marks):
    """P5: exit code 3, one quarantine record with its traceback, everything else committed; again it is still 3."""
    config, output = write_config(tmp_path, marks, groups={"checkpoint_every": 1}), tmp_path / "out"
    manifest = write_manifest(tmp_path, ["good 0", "bad !raise-denoise", "good 1", "bad !raise-encode", "good 2"])
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 3, text
    assert set(records(output)) == {"s00", "s02", "s04"}
    bad = records(output, "quarantine")
    assert set(bad) == {"s01", "s03"}
    assert bad["s01"]["class"] == "POISON"
    assert "made to fail at denoise" in bad["s01"]["message"]
    assert "misbehave" in bad["s01"]["traceback"]
    assert [row["id"] for row in table(output)] == ["s00", "s02"]
    assert count(marks, "steps")["bad !raise-denoise 1"] == 2, "the second try trusted nothing of the first"
    assert not list((output / "steps").rglob("*.safetensors"))
    code, text = render(config, manifest, output, "127.0.0.1:1")
    assert code == 3, text


@pytest.mark.slow
def test_a_run_whose_every_sample_fails_alike_stops_with_that_error(ray_head, tmp_path, marks):
    """P5, P6: wrong weights end the run with exit code 1 and without _SUCCESS, and do not quarantine the manifest.

    With a commit in the root, the same failures are those of the samples, up to `retries.max_quarantined`."""
    config, output = write_config(tmp_path, marks), tmp_path / "out"
    manifest = write_manifest(tmp_path, [f"bad {n} !nan-denoise" for n in range(40)] + ["good 40"])
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 1, text
    assert "nothing has been committed, and 8 different samples failed alike, with POISON: ValueError: latents" in text
    assert not (output / "_SUCCESS").exists()
    quarantined = len(records(output, "quarantine"))
    assert quarantined < 16
    causes = json.loads((output / "report" / "report.json").read_text())["causes"]
    assert sum(cause["count"] for cause in causes) == quarantined
    code, text = finish(start([*command(config, manifest, output, ray_head[0]), "--shards", "10"]))
    assert code == 0, text
    code, text = render(config, manifest, output, ray_head[0], "retries.max_quarantined=0.1")
    assert code == 1, text
    assert "5 samples are quarantined in this run, and retries.max_quarantined allows 4" in text
    assert len(records(output, "quarantine")) == quarantined + 5


@pytest.mark.slow
def test_a_fault_that_every_rank_finds_keeps_the_group(ray_head, tmp_path, marks):
    """P5: if all ranks raise the same error for a sample, the group keeps its weights and renders the next one."""
    config, output = write_config(tmp_path, marks), tmp_path / "out"
    code, text = render(config, write_manifest(tmp_path, ["good 0", "bad !nan-denoise", "good 1"]), output, ray_head[0])
    assert code == 3, text
    assert set(records(output)) == {"s00", "s02"}
    assert len((marks / "join-0-of-2").read_text().splitlines()) == 1, "the group was built once"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["!freeze-denoise-once", "!kill-encode-once", "!kill-denoise-once"])
def test_a_lost_worker_costs_one_try(expected, ray_head, tmp_path, marks, fault):
    """P4: a rank or encoder that dies or hangs is replaced, the sample is retried, and the bytes are the same."""
    config = write_config(tmp_path, marks, timeouts={"stall_s": 4})
    prompts = ["good 0", f"bad {fault}", "good 1"]
    output = tmp_path / "out"
    code, text = render(config, write_manifest(tmp_path, prompts), output, ray_head[0])
    assert code == 0, text
    found = records(output)
    assert set(found) == {"s00", "s01", "s02"}
    assert count(marks, "denoised") == dict.fromkeys(prompts, 1), text
    assert videos(output).items() <= expected
    if "encode" not in fault:
        assert found["s01"]["attempts"] == 2
        assert found["s01"]["history"][0]["kind"] == "INFRA"


@pytest.mark.slow
def test_a_dead_decoder_never_repeats_a_denoise(expected, ray_head, tmp_path, marks):
    """P3, P4: the final latents were written first, so a decoder's death costs a decode and nothing else."""
    (marks / "decoder-dies").touch()
    config, output = write_config(tmp_path, marks), tmp_path / "out"
    code, text = render(config, write_manifest(tmp_path, PROMPTS[:3]), output, ray_head[0])
    assert code == 0, text
    assert count(marks, "denoised") == dict.fromkeys(PROMPTS[:3], 1)
    assert len(records(output)) == 3
    assert videos(output).items() <= expected


@pytest.mark.slow
def test_eight_ranks_are_placed_on_fake_gpus(expected, ray_head, tmp_path, marks):
    """Placement, P3: a group of eight ranks is placed on eight GPUs that Ray counts, real or not."""
    config = write_config(tmp_path, marks, parallel={"ulysses_degree": 4, "ring_degree": 2})
    code, text = render(config, write_manifest(tmp_path, PROMPTS[:2]), tmp_path / "out", ray_head[0])
    assert code == 0, text
    assert {path.name for path in marks.glob("join-*")} == {f"join-{rank}-of-8" for rank in range(8)}
    assert videos(tmp_path / "out").items() <= expected


def test_more_gpus_than_the_cluster_has_are_reported(ray_head, tmp_path, marks):
    """P6: the message names the needed and the existing GPUs before anything is placed."""
    config = write_config(
        tmp_path, marks, parallel={"ulysses_degree": 12}, timeouts={"start_s": 1, "stall_s": 60, "drain_s": 30}
    )
    code, text = render(config, write_manifest(tmp_path, PROMPTS[:1]), tmp_path / "out", ray_head[0])
    assert code == 1, text
    assert "12 GPU" in text
    assert "8 GPU" in text
    assert "Traceback" not in text
    assert not list(marks.glob("join-*"))


@pytest.mark.slow
def test_changed_config_is_refused_with_the_difference(undisturbed, ray_head):
    """P2: another config for the same output root is refused with the difference."""
    arguments = (undisturbed / "config.yaml", undisturbed / "manifest.jsonl", undisturbed / "out", ray_head[0])
    code, text = render(*arguments, "defaults.num_inference_steps=5")
    assert code == 1
    assert "num_inference_steps: 4 -> 5" in text
    code, text = render(*arguments, "groups.count=2")
    assert code == 0, "how many groups render is not part of a run's identity"


@pytest.mark.slow
def test_parquet_manifest_renders_the_same(undisturbed, ray_head, tmp_path, marks):
    """A Parquet manifest with the same rows gives the same videos."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (undisturbed / "manifest.jsonl").read_text().splitlines()]
    manifest = tmp_path / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(rows), manifest)
    code, text = render(write_config(tmp_path, marks), manifest, tmp_path / "out", ray_head[0])
    assert code == 0, text
    assert videos(tmp_path / "out") == videos(undisturbed / "out")
