"""The estimate of the remaining time."""

from __future__ import annotations

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
