"""Small runs on an S3 endpoint that fails, without Ray: nothing is lost, doubled, wrong or left (P1, P2, P3)."""

from __future__ import annotations

import time

import pytest

from tests.chaos.storage_runs import StorageRuns, endpoints

FIXED = (1,)  # seeds that `pytest -m slow` runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with endpoints(seed=1) as servers:
        yield StorageRuns(tmp_path_factory.mktemp("storage"), servers)


@pytest.mark.slow
@pytest.mark.parametrize("seed", FIXED)
def test_a_run_on_a_faulty_endpoint_ends_as_an_undisturbed_one(runs, seed):
    result = runs.run(seed)
    assert result.findings == [], result
    assert result.requests, "no request was disturbed"


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_many_runs_on_a_faulty_endpoint(request, runs):
    """`pytest -m chaos --chaos-minutes N --seed N tests/chaos/test_storage_runs.py`."""
    seed, deadline = (
        request.config.getoption("--seed"),
        time.monotonic() + 60 * request.config.getoption("--chaos-minutes"),
    )
    failed = []
    while time.monotonic() < deadline:
        result = runs.run(seed)
        print(result, flush=True)
        failed += [result] if result.findings else []
        seed += 1
    assert failed == []
