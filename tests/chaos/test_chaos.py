"""Long chaos runs: `pytest -m chaos --chaos-minutes 60 --seed 1`. The seed and each schedule are printed."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest

from tests.chaos.campaign import run_campaign, table


@pytest.mark.chaos
@pytest.mark.timeout(0)
@pytest.mark.parametrize("engine", ["fake", "toy"])
def test_nothing_is_lost_doubled_wrong_or_left(request, tmp_path, engine):
    """P1-P5: whatever the schedules do, each run ends as an undisturbed one, and nothing is left behind."""
    minutes, seed = request.config.getoption("--chaos-minutes"), request.config.getoption("--seed")
    deadline = time.monotonic() + 60.0 * minutes
    print(f"seed {seed}")
    results = run_campaign(tmp_path, engine, seed, lambda _: time.monotonic() < deadline, lambda result: print(result))
    results = [dataclasses.asdict(result) for result in results]
    print(table(results))
    found = {result["seed"]: result["findings"] for result in results if result["findings"]}
    assert not found, json.dumps(found, indent=1)
