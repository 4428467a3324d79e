"""`hv-batch bench job` on a local Ray."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.repository import ROOT


@pytest.mark.slow
def test_the_bench_reports_what_it_rendered(ray_environment):
    """Speed claims can be reproduced by one command, which commits real samples and cleans up."""
    command = [sys.executable, "-m", "hv_batch", "bench", "job", "--samples", "12", "--groups", "1", "--decoders", "1"]
    # One worker of each stage: CPU time is read only while no worker starts, and a second decoder may start until the
    # end of the run.
    command += ["--step-seconds", "0.02", "--json", "--with-ray-data"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["load"]["samples"] == 12
    assert 0 < report["pace"]["per_second"] < 1 / 0.02
    assert report["pace"]["cpu_ms"] > 0
    assert report["first_denoise_s"] > 0
    assert 0 < report["groups_busy"] <= 1
    assert report["driver_mb"] > 50
    assert 0 < report["loop_max_ms"] < 60_000
    assert report["ray_data"]["per_second"] > 0
