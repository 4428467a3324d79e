"""How many samples one task takes: hv_batch.job.scheduling.micro_batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.scheduling import micro_batches
from hv_batch.job.scheduling.limits import MAX_MICRO_BATCH
from hv_batch.job.scheduling.micro_batches import MICRO_BATCH_SECONDS, MicroBatcher
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload

KINDS = [Workload(shape, 50, 1) for shape in ((64, 64, 1), (128, 128, 1), (720, 1280, 129))]
SECONDS = st.floats(0.0, 2 * MICRO_BATCH_SECONDS)
TASKS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, MAX_MICRO_BATCH), SECONDS), max_size=20)


@given(tasks=TASKS, waiting=st.lists(st.sampled_from(KINDS), max_size=2 * MAX_MICRO_BATCH))
def test_a_task_takes_no_more_than_half_a_second(tasks, waiting):
    """P4, P5: what a lost task costs is bounded, by what its samples took last, and there is always a next task."""
    known = MicroBatcher()
    last = {}
    for kind, count, seconds in tasks:
        known.measure(Stage.DECODE, [kind] * count, seconds)
        last[kind] = seconds
    taken = waiting[: known.batch_size(Stage.DECODE, waiting)]
    assert bool(taken) == bool(waiting)
    assert len(taken) <= MAX_MICRO_BATCH
    if len(taken) > 1:
        assert all(kind in last for kind in taken), "one that nobody knows travels alone"
        assert sum(last[kind] for kind in taken) <= MICRO_BATCH_SECONDS + 1e-9


def test_what_was_slow_once_is_not_taken_for_quick_at_once():
    """P4: after a slow task, its kind of work travels alone until quick ones have shown that this is over."""
    known = MicroBatcher()
    known.measure(Stage.DENOISE, [KINDS[0]], 0.01)
    assert known.batch_size(Stage.DENOISE, [KINDS[0]] * 9) == 9
    known.measure(Stage.DENOISE, [KINDS[0]], 10.0)
    sizes = []
    for _ in range(60):
        known.measure(Stage.DENOISE, [KINDS[0]], 0.01)
        sizes.append(known.batch_size(Stage.DENOISE, [KINDS[0]] * 9))
    assert sizes[0] == 1
    assert sizes[-1] == 9
    assert sizes == sorted(sizes)


def test_a_mixed_task_tells_nothing_of_its_kinds():
    """A video among pictures would make them all look slow, and itself quick."""
    known = MicroBatcher()
    known.measure(Stage.DENOISE, [KINDS[0], KINDS[1]], 0.01)
    assert known.batch_size(Stage.DENOISE, [KINDS[1]] * 2) == 1
    assert known.batch_size(Stage.DENOISE, [KINDS[0]] * 2) == 1


def test_stations_are_known_one_by_one():
    """A picture that is denoised quickly may take long to be committed."""
    known = MicroBatcher()
    known.measure(Stage.DENOISE, [KINDS[0]], 0.01)
    assert known.batch_size(Stage.DECODE, [KINDS[0]] * 2) == 1
    assert (known.typical_batch_size(Stage.DENOISE), known.typical_batch_size(Stage.DECODE)) == (MAX_MICRO_BATCH, 1)


def test_no_more_kinds_are_remembered_than_a_driver_can_hold(monkeypatch):
    """P7: a manifest may have a shape a row; those measured longest ago are forgotten."""
    monkeypatch.setattr(micro_batches, "MAX_WORKLOADS", 3)
    known = MicroBatcher()
    for width in range(10):
        known.measure(Stage.DENOISE, [Workload((16, width, 1), 50, 1)], 0.01)
    assert [known.batch_size(Stage.DENOISE, [Workload((16, width, 1), 50, 1)] * 2) for width in range(10)] == [
        1
    ] * 7 + [2] * 3
