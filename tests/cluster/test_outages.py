"""Runs whose S3 endpoint is stopped and started again: videos wait on the node's disk, and none is rendered twice."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs import count, finish, start, write_config, write_manifest
from tests.support.runs import dataset as local_dataset
from tests.support.s3_runs import BUCKET, objects

# Shortens the pauses of an outage. The runs use a local Ray: actors inherit the credentials of its environment.
IMPATIENT = (
    "from hv_batch.job.scheduling import limits; limits.OUTAGE_PAUSE_S = 1.0; "
    "from hv_batch.cli.main import main; main()"
)
DEADLINE_S = 180  # a machine that is busy with other things takes its time

# More than the stages hold: without a spool, the groups would have to stop.
PROMPTS = [f"prompt {i}" for i in range(12)]

pytestmark = pytest.mark.slow


def wait_for(condition, what, process):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"never saw {what}:\n{process.stdout.read()}")
        time.sleep(0.05)


def begin(folder: Path, marks: Path, root: str, spool_gib: float = 1.0, placement: str = "pool"):
    """All samples are in one shard, because the next shard would have to be looked up in the output root."""
    config = write_config(
        folder,
        marks,
        groups={"gpus_per_rank": 0, "cpus_per_rank": 0.1},
        decoders={"placement": placement},
        output={"shard_size": 50, "spool_gib": spool_gib, "spool_folder": str(folder / "disk")},
        media={"poster": True},
    )
    arguments = ["run", "--config", str(config), "--manifest", str(write_manifest(folder, PROMPTS)), "--output", root]
    return start([sys.executable, "-c", IMPATIENT, *arguments])


def root_in_bucket(folder: Path) -> str:
    """Objects outlast a restart of the server, so each test has a root of its own."""
    return f"s3://{BUCKET}/{folder.name}"


def waiting(folder: Path, what: str = "*.json") -> list[Path]:
    """Records, or other files, on the disk of the node."""
    return [path for path in (folder / "disk").rglob(what) if path.is_file()]


def begin_and_stop_endpoint(server, folder: Path, marks: Path, **options):
    """A run that has decoded its first video when its endpoint is stopped."""
    (marks / "hold-decodes").touch()
    driver = begin(folder, marks, root_in_bucket(folder), **options)
    wait_for(lambda: count(marks, "decoded"), "a decode", driver)
    server.stop()
    (marks / "hold-decodes").unlink()
    return driver


@pytest.fixture(scope="module")
def undisturbed(ray_environment, tmp_path_factory):
    """The dataset of a run whose output root always answers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "marks").mkdir()
    code, text = finish(begin(folder, folder / "marks", str(folder / "out")))
    assert code == 0, text
    return local_dataset(folder / "out")


def assert_undisturbed(undisturbed, folder: Path, marks: Path) -> None:
    """The root is that of an undisturbed run, and each sample was rendered once and has one attempt."""
    own = f"{folder.name}/"
    found = {key.removeprefix(own): data for key, data in objects().items() if key.startswith(own)}
    assert {key: data for key, data in found.items() if key.startswith("data/")} == undisturbed
    records = [json.loads(data) for key, data in found.items() if key.startswith("commits/")]
    assert len(records) == len(PROMPTS)
    assert {record["attempts"] for record in records} == {1}
    assert all(record["poster"] in found for record in records)
    assert any(record["places"]["decode"].get("spooled") for record in records)
    assert "_SUCCESS" in found
    assert not [key for key in found if key.startswith(("latents/", "steps/"))]
    for what in ("encoded", "denoised"):
        assert count(marks, what) == dict.fromkeys(PROMPTS, 1)
    assert waiting(folder, "[!.]*") == []


@pytest.mark.parametrize("placement", ["pool", "group"])
def test_a_run_goes_on_while_its_endpoint_is_stopped(undisturbed, s3_root, tmp_path, marks, placement):
    """P5, P7, P3: all samples are rendered while the server is down; when it answers again all are committed, and the
    bytes are those of an undisturbed run.
    """
    driver = begin_and_stop_endpoint(s3_root, tmp_path, marks, placement=placement)
    wait_for(lambda: len(waiting(tmp_path)) == len(PROMPTS), "all videos on the disk", driver)
    s3_root.start()
    code, text = finish(driver)
    assert code == 0, text
    assert "the output root does not answer" in text
    assert "the output root answers again" in text
    assert count(marks, "decoded").total() == len(PROMPTS)
    assert_undisturbed(undisturbed, tmp_path, marks)


def test_a_resume_commits_what_a_killed_run_left_on_the_disk(undisturbed, s3_root, tmp_path, marks):
    """P2, P4: the driver is killed in the outage; the same command commits its videos and renders nothing."""
    driver = begin_and_stop_endpoint(s3_root, tmp_path, marks)
    wait_for(lambda: len(waiting(tmp_path)) == len(PROMPTS), "all videos on the disk", driver)
    driver.kill()
    driver.wait()
    s3_root.start()
    code, text = finish(begin(tmp_path, marks, root_in_bucket(tmp_path)))
    assert code == 0, text
    assert "that an earlier outage had left on the disk of a node" in text
    assert "0 rendered, 0 quarantined now, 12 were done before" in text
    assert count(marks, "decoded").total() == len(PROMPTS)
    assert_undisturbed(undisturbed, tmp_path, marks)


def test_a_full_spool_makes_the_groups_wait(undisturbed, s3_root, tmp_path, marks):
    """P7, P5: beyond its limit nothing is written, groups stop, and no attempt is counted; later all is committed."""
    cap_bytes = 24_000
    driver = begin_and_stop_endpoint(s3_root, tmp_path, marks, spool_gib=cap_bytes / 2**30)
    said = ""
    while "OUTAGE" not in said:  # a decode found neither the root nor room
        said += driver.stdout.readline()
    assert 0 < sum(path.stat().st_size for path in waiting(tmp_path, "*")) <= cap_bytes
    assert len(waiting(tmp_path)) < len(PROMPTS)
    s3_root.start()
    code, text = finish(driver)
    assert code == 0, said + text
    assert_undisturbed(undisturbed, tmp_path, marks)


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "RequestTimeTooSkewed"), (418, "Unknown")])
def test_a_run_continues_after_its_credentials_are_renewed(undisturbed, s3_root, tmp_path, marks, status, code):
    """P5: expired credentials, a wrong clock and unknown errors are outages: videos go to the disk, no sample is
    charged, and the log names the cause.
    """
    (marks / "hold-decodes").touch()
    driver = begin(tmp_path, marks, root_in_bucket(tmp_path))
    wait_for(lambda: count(marks, "decoded"), "a decode", driver)
    s3_root.refusal = (status, code)
    (marks / "hold-decodes").unlink()
    wait_for(lambda: len(waiting(tmp_path)) == len(PROMPTS), "all videos on the disk", driver)
    s3_root.refusal = None
    exit_code, text = finish(driver)
    assert exit_code == 0, text
    assert code in text
    assert_undisturbed(undisturbed, tmp_path, marks)


def test_a_store_that_forgets_a_video_does_not_get_a_sealed_shard_without_it(s3_root, tmp_path, marks):
    """P1: the confirmed put of a video is lost; the same command renders the sample again and seals the whole shard."""
    s3_root.forgets = [f"{tmp_path.name}/data/shard-"]
    code, text = finish(begin(tmp_path, marks, root_in_bucket(tmp_path)))
    assert code == 0, text
    assert "files of 1 committed sample are missing" in text
    found = objects()
    records = [json.loads(data) for key, data in found.items() if key.startswith(f"{tmp_path.name}/commits/")]
    assert len(records) == len(PROMPTS)
    for record in records:
        assert len(found[f"{tmp_path.name}/{record['file']}"]) == record["bytes"]
    assert f"{tmp_path.name}/_SUCCESS" in found
    assert count(marks, "decoded").total() == len(PROMPTS) + 1
