"""The estimate of the remaining time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.progress import EtaEstimator, Snapshot


def snapshot(total: int, here: int, before: int) -> Snapshot:
    return Snapshot(
        total=total, committed=here + before, quarantined=0, done_before=before,
        starting=0, encoding=0, denoising=0, decoding=0,
    )  # fmt: skip


counts = st.integers(0, 50)


@given(st.lists(st.tuples(counts, counts, counts, st.floats(0, 1e5)), max_size=20))
def test_an_estimate_is_never_negative(readings):
    """Whatever the counts: those of a second night begin at 0 again, and an earlier run may have done more."""
    estimator, now = EtaEstimator(), 0.0
    for total, here, before, seconds in readings:
        now += seconds
        eta = estimator.eta_s(snapshot(total, here, before), now)
        assert eta is None or eta >= 0


def test_a_second_night_is_estimated_from_its_own_samples():
    estimator = EtaEstimator()
    for number in range(1, 11):
        estimator.eta_s(snapshot(10, number, 0), 10.0 * number)
    assert estimator.eta_s(snapshot(20, 0, 10), 110.0) is None
    assert estimator.eta_s(snapshot(20, 1, 10), 120.0) is None
    assert estimator.eta_s(snapshot(20, 2, 10), 140.0) == 8 * 20.0


@pytest.mark.parametrize(
    ("total", "here", "rate", "eta", "begin"),
    [
        (12, 0, None, None, "0% · --/min · ETA --:-- · 0/12 done · "),
        (12, 3, 0.5, 18.0, "25% · 30/min · ETA 00:18 · 3/12 done · "),
        (2000, 1999, 1 / 338, 338.0, "99% · 10.7/h · ETA 05:38 · 1999/2000 done · "),
        (12, 12, 0.5, 0.0, "100% · 30/min · ETA 00:00 · 12/12 done · "),
    ],
)
def test_a_line_of_progress_starts_with_percent_rate_and_eta(total, here, rate, eta, begin):
    """100% means that all samples are done, so 1999 of 2000 are 99%."""
    assert str(replace(snapshot(total, here, 0), samples_per_s=rate, eta_s=eta)).startswith(begin)
