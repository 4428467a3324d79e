"""A whole run on an S3 endpoint that fails for a while, with credentials that must not appear anywhere."""

from __future__ import annotations

import io
import json
import sys
import threading

import boto3
import pyarrow.parquet as pq
import pytest

from tests.support.runs import finish, start, write_config
from tests.support.s3_runs import BUCKET, SECRET, objects

# The default pause is too long for a test. The Ray is local, so that the actors inherit the credentials.
QUICK = "from hv_batch.job.scheduling import limits; limits.OUTAGE_PAUSE_S = 1.0"
IMPATIENT = f"{QUICK}; from hv_batch.cli.main import main; main()"
DEADLINE_S = 240  # a machine that is busy with other things takes its time


def run(config, manifest: str):
    arguments = ["run", "--config", str(config), "--manifest", manifest, "--output", f"s3://{BUCKET}/run"]
    return start([sys.executable, "-c", IMPATIENT, *arguments])


def read_until(process, words: str, log: list[str]) -> None:
    """Collect the lines of a process until one holds `words`."""
    alarm = threading.Timer(DEADLINE_S, process.kill)
    alarm.start()
    for line in process.stdout:
        log.append(line)
        if words in line:
            alarm.cancel()
            return
    pytest.fail(f"never said {words!r}:\n{''.join(log)}")


@pytest.mark.slow
def test_a_run_on_s3_survives_an_outage_and_writes_no_secret(ray_environment, s3_root, tmp_path, marks):
    """P5, P2: while the root is away the driver waits, for its own records as well; nothing is rendered twice, every
    sample ends in one record. Neither objects nor log hold a credential, a password or a signature of a URL.
    """
    config = write_config(
        tmp_path,
        marks,
        {"step_seconds": 0.1},
        groups={"gpus_per_rank": 0, "cpus_per_rank": 0.1},
        encoders={"batch_size": 1},
        output={"shard_size": 2, "webdataset": True},
        media={"codec": "h265", "poster": True},
        retries={"poison": 1},
    )
    prompts = ["good 0", "bad !raise-denoise", "good 1", "bad !raise-encode", "good 2", "good 0"]
    rows = "".join(json.dumps({"id": f"s{i}", "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts))
    boto3.client("s3").put_object(Bucket=BUCKET, Key="in/manifest.jsonl", Body=rows.encode(), ACL="public-read")
    manifest = f"{s3_root.endpoint}/{BUCKET}/in/manifest.jsonl?X-Amz-Signature={SECRET}"
    log: list[str] = []
    driver = run(config, manifest)
    read_until(driver, "with s1: POISON", log)
    s3_root.methods, s3_root.faults = {"GET", "HEAD", "PUT", "DELETE"}, [503] * 10_000
    read_until(driver, "the output root does not answer", log)
    s3_root.faults = []
    code, text = finish(driver)
    text = "".join(log) + text
    assert code == 3, text
    assert "the output root answers again" in text
    found = objects()
    for kind, keys in {"commits": "s0 s2 s4 s5", "quarantine": "s1 s3"}.items():
        assert sorted(key.rpartition("/")[2] for key in found if key.startswith(f"run/{kind}/")) == [
            f"{key}.json" for key in keys.split()
        ]
    sealed = [found[f"run/data/shard-0000{shard}/metadata.parquet"] for shard in range(3)]
    assert [pq.read_table(io.BytesIO(table)).num_rows for table in sealed] == [1, 1, 2]
    assert "run/_SUCCESS" in found
    assert not [key for key in found if key.startswith("run/latents/")]
    assert sum(key.startswith("run/posters/") for key in found) == 4
    assert sum(key.startswith("run/webdataset/") for key in found) == 3
    denoised = (marks / "denoised").read_text().split("\n")[:-1]
    assert sorted(denoised) == ["good 0", "good 0", "good 1", "good 2"]
    assert [prompt for prompt in (marks / "encoded").read_text().split("\n") if prompt].count("good 0") == 1
    assert json.loads(found["run/summary.json"])["embeddings"] == {"encoded": 3, "recalled": 1}
    assert SECRET not in text
    assert [key for key, data in found.items() if SECRET.encode() in data] == []
