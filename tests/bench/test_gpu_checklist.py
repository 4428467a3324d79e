"""tests/gpu/checklist.py, tried on the CPU: every measurement exists and runs, and it ends in time whatever happens."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from hv_batch.bench.checklist_items import list_items
from tests.support.repository import ROOT

pytestmark = pytest.mark.slow

KERNELS = ("sdpa", "cudnn", "flash", "fa3", "fa4")


def run(*flags):
    command = [sys.executable, str(ROOT / "tests/gpu/checklist.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=420, cwd="/")


@pytest.mark.timeout(600)
def test_every_measurement_runs_on_the_cpu(tmp_path):
    """Nothing fails, and what cannot run on a CPU names its reason."""
    result = run("--device", "cpu", "--preset", "toy", "--minutes", "6", "--output", str(tmp_path / "list"))
    assert result.returncode == 0, result.stdout + result.stderr
    items = {item["item"]: item for item in json.loads((tmp_path / "list.json").read_text())["items"]}
    assert items.keys() >= {"tests/gpu", *list_items(["toy"])}
    assert {item["status"] for item in items.values()} == {"ok", "skipped"}, result.stdout
    skipped = {name for name in list_items(["toy"]) if items[name]["status"] == "skipped"}
    assert skipped == {f"toy dense {kernel}" for kernel in KERNELS[1:]}
    assert all("CUDA" in items[name]["note"] for name in skipped)
    assert items["toy dense sdpa"]["step_s"] > 0
    assert items["toy cache"]["share"] < 1
    assert "| toy whole | ok |" in (tmp_path / "list.md").read_text()


def test_it_ends_in_time_and_lists_what_it_left_out(tmp_path):
    """Parts that exceed their time are stopped; the results of the others are written."""
    begun = time.monotonic()
    result = run("--device", "cpu", "--preset", "mid", "--minutes", "0.4", "--output", str(tmp_path / "list"))
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - begun < 60
    statuses = {item["status"] for item in json.loads((tmp_path / "list.json").read_text())["items"]}
    assert statuses & {"stopped", "left out"}


def test_without_a_gpu_it_says_so(tmp_path):
    result = run("--output", str(tmp_path / "list"))
    assert result.returncode == 1
    assert "No CUDA device is visible" in result.stdout
    assert not list(tmp_path.iterdir())
