"""hv_batch.job.scheduling.micro_batches: how many samples one task takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.scheduling import micro_batches
from hv_batch.job.scheduling.limits import MAX_MICRO_BATCH
from hv_batch.job.scheduling.micro_batches import MICRO_BATCH_SECONDS, MicroBatcher
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload

WORKLOADS = [Workload(shape, 50, 1) for shape in ((64, 64, 1), (128, 128, 1), (720, 1280, 129))]
SECONDS = st.floats(0.0, 2 * MICRO_BATCH_SECONDS)
TASKS = st.lists(st.tuples(st.sampled_from(WORKLOADS), st.integers(1, MAX_MICRO_BATCH), SECONDS), max_size=20)


@given(tasks=TASKS, waiting=st.lists(st.sampled_from(WORKLOADS), max_size=2 * MAX_MICRO_BATCH))
def test_a_task_takes_no_more_than_half_a_second(tasks, waiting):
    """P4, P5: property: the cost of a lost task is bounded by its estimate, and a queue always gives a next task."""
    batcher = MicroBatcher()
    last = {}
    for workload, count, seconds in tasks:
        batcher.measure(Stage.DECODE, [workload] * count, seconds)
        last[workload] = seconds
    taken = waiting[: batcher.batch_size(Stage.DECODE, waiting)]
    assert bool(taken) == bool(waiting)
    assert len(taken) <= MAX_MICRO_BATCH
    if len(taken) > 1:
        assert all(workload in last for workload in taken), "a sample of unbatcher workload runs alone"
        assert sum(last[workload] for workload in taken) <= MICRO_BATCH_SECONDS + 1e-9


def test_a_slow_task_makes_its_workload_run_alone_for_a_while():
    """P4: after a slow task, samples of its workload run alone until enough quick tasks have lowered the estimate."""
    batcher = MicroBatcher()
    batcher.measure(Stage.DENOISE, [WORKLOADS[0]], 0.01)
    assert batcher.batch_size(Stage.DENOISE, [WORKLOADS[0]] * 9) == 9
    batcher.measure(Stage.DENOISE, [WORKLOADS[0]], 10.0)
    sizes = []
    for _ in range(60):
        batcher.measure(Stage.DENOISE, [WORKLOADS[0]], 0.01)
        sizes.append(batcher.batch_size(Stage.DENOISE, [WORKLOADS[0]] * 9))
    assert sizes[0] == 1
    assert sizes[-1] == 9
    assert sizes == sorted(sizes)


def test_a_mixed_task_updates_no_estimate():
    """A mean over images and a video would make the images seem slow and the video quick."""
    batcher = MicroBatcher()
    batcher.measure(Stage.DENOISE, [WORKLOADS[0], WORKLOADS[1]], 0.01)
    assert batcher.batch_size(Stage.DENOISE, [WORKLOADS[1]] * 2) == 1
    assert batcher.batch_size(Stage.DENOISE, [WORKLOADS[0]] * 2) == 1


def test_each_stage_has_its_own_estimates():
    """An image that is denoised quickly may take long to commit."""
    batcher = MicroBatcher()
    batcher.measure(Stage.DENOISE, [WORKLOADS[0]], 0.01)
    assert batcher.batch_size(Stage.DECODE, [WORKLOADS[0]] * 2) == 1
    assert (batcher.typical_batch_size(Stage.DENOISE), batcher.typical_batch_size(Stage.DECODE)) == (MAX_MICRO_BATCH, 1)


def test_the_number_of_estimates_is_bounded(monkeypatch):
    """P7: a manifest may have a new shape in each row; the least recently measured estimates are dropped."""
    monkeypatch.setattr(micro_batches, "MAX_WORKLOADS", 3)
    batcher = MicroBatcher()
    for width in range(10):
        batcher.measure(Stage.DENOISE, [Workload((16, width, 1), 50, 1)], 0.01)
    assert [batcher.batch_size(Stage.DENOISE, [Workload((16, width, 1), 50, 1)] * 2) for width in range(10)] == [
        1
    ] * 7 + [2] * 3
