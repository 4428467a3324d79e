"""`hv-batch bench group` on a local Ray."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.repository import ROOT


@pytest.mark.slow
def test_the_bench_reports_kills_and_idle_time(ray_environment):
    """Speed claims can be reproduced by one command, which kills, rebuilds and commits real groups and cleans up."""
    command = [sys.executable, "-m", "hv_batch", "bench", "group", "--json", "--ranks", "2", "--kills", "2"]
    command += ["--groups", "2", "--samples", "2", "--steps", "2", "--step-seconds", "0.2", "--frames", "5"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rebuild, idle = report["rebuild"], report["idle"]
    assert (rebuild["ranks"], rebuild["kills"]) == (2, 2)
    sums = [rebuild[phase]["since_kill"] for phase in ("notice", "processes", "meet", "step")]
    assert all(0 < minimum <= median for minimum, median in sums)
    assert sums == sorted(sums)
    assert 1 <= idle["groups"] <= 2
    assert idle["samples"] == 4
    assert all(0 < share < 1 for share in idle["shares"])
