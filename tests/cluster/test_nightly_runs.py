"""The nightly job on a real Ray with the fake engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from hv_batch.job import layout
from hv_batch.job.records.lease import hold_lease
from hv_batch.job.records.lease_holder import LEASE_SCHEMA, this_process
from hv_batch.job.storage import canonical_json
from hv_batch.job.storage.store import Store
from tests.support.repository import ROOT
from tests.support.runs import dataset, render, write_config, write_manifest

PROMPTS = [f"prompt {i}" for i in range(4)]
# The patience with a driver of another machine is made for nights.
QUICK = "from hv_batch.job.records import lease; lease.STALE_S, lease.POLL_S = 1.0, 0.2"
IMPATIENT = ("-c", f"{QUICK}; from hv_batch.cli.main import main; main()")


def hv_batch(*arguments, program=("-m", "hv_batch")) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT, text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def partition(folder, day, prompts):
    (folder / day).mkdir()
    return write_manifest(folder / day, prompts)


def nightly(folder, config, address, *flags, **options) -> tuple[int, dict, str]:
    arguments = ["--config", config, "--output", folder / "nights", "--address", address, *flags]
    code, out, err = hv_batch("nightly", "--manifest", f"{folder}/{{date}}/manifest.jsonl", *arguments, **options)
    (line,) = out.splitlines()
    return code, json.loads(line), err


@pytest.mark.slow
def test_a_night_catches_up_and_survives_a_bad_one(ray_head, tmp_path, marks):
    """P2, P5: earlier nights are resumed by their run.json alone, and one that fails does not stop the others."""
    config = write_config(tmp_path, marks)
    for day in ("2026-11-17", "2026-11-18"):
        manifest = partition(tmp_path, day, PROMPTS)
        code, text = render(config, manifest, tmp_path / "nights" / day, ray_head[0])
        assert code == 0, text
        (tmp_path / "nights" / day / "_SUCCESS").unlink()
    whole = dataset(tmp_path / "nights" / "2026-11-18")
    victim = next((tmp_path / "nights" / "2026-11-18" / "commits").rglob("s02.json"))
    victim.unlink()
    next((tmp_path / "nights" / "2026-11-18" / "data").rglob("metadata.parquet")).unlink()
    shutil.rmtree(tmp_path / "2026-11-17")  # its manifest is gone, and so is the copy
    shutil.rmtree(tmp_path / "nights" / "2026-11-17" / "plan")
    partition(tmp_path, "2026-11-19", [*PROMPTS[:3], "bad !raise-denoise"])

    code, line, err = nightly(tmp_path, config, ray_head[0], "--date", "2026-11-19")
    assert [night["date"] for night in line["nights"]] == ["2026-11-17", "2026-11-18", "2026-11-19"], err
    assert [night["outcome"] for night in line["nights"]] == ["failed", "committed", "quarantined"], err
    assert "does not exist" in line["nights"][0]["error"]
    assert [line["nights"][2][name] for name in ("committed", "quarantined", "pending")] == [3, 1, 0]
    assert (code, line["exit_code"], line["outcome"]) == (1, 1, "failed")
    assert dataset(tmp_path / "nights" / "2026-11-18") == whole


@pytest.mark.slow
def test_a_night_and_the_leases_of_others(ray_head, tmp_path, marks):
    """P5: the lease of a driver that is gone is taken over after a while. If another driver still writes to the root,
    the night is held: it ends at once and names that driver."""
    config = write_config(tmp_path, marks)
    manifest = partition(tmp_path, "2026-11-18", PROMPTS)
    code, text = render(config, manifest, tmp_path / "nights" / "2026-11-18", ray_head[0])
    assert code == 0, text
    left = Store(str(tmp_path / "nights" / "2026-11-18"))
    gone = replace(this_process("run"), machine="another", host="node-7")
    left.put(layout.LEASE, canonical_json.encode({"schema": LEASE_SCHEMA, **asdict(gone)}))
    left.delete(layout.SUCCESS)
    partition(tmp_path, "2026-11-19", PROMPTS)
    with hold_lease(Store(str(tmp_path / "nights" / "2026-11-19")), this_process("run", "raysubmit_9")):
        code, line, err = nightly(tmp_path, config, ray_head[0], "--date", "2026-11-19", program=IMPATIENT)
    assert [night["outcome"] for night in line["nights"]] == ["committed", "held"], err
    assert "node-7" in err
    assert "raysubmit_9" in line["nights"][1]["error"]
    assert (code, line["outcome"]) == (4, "held")
    code, line, err = nightly(tmp_path, config, ray_head[0], "--date", "2026-11-19")
    assert (code, line["outcome"]) == (0, "committed"), err
