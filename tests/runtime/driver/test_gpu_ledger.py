"""The GPU time of a run by use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.stages import Stage
from hv_batch.runtime.driver.gpu_ledger import USES, GpuLedger, use_of

amounts = st.floats(0, 64, allow_nan=False)
looks = st.lists(st.tuples(st.sampled_from(USES), amounts), max_size=6)


@given(st.lists(st.tuples(st.floats(0.1, 5), looks), min_size=1, max_size=8))
def test_the_uses_add_up_to_the_gpu_time_of_the_workers(polls):
    """What is charged is the time between two looks times the GPUs that are reserved at the second."""
    ledger, now, expected, reported = GpuLedger(), 0.0, 0.0, 0.0
    for number, (elapsed, uses) in enumerate(polls):
        now += elapsed
        reported += sum(ledger.note(uses, now).values())
        expected += elapsed * sum(gpus for _, gpus in uses) if number else 0.0
    assert sum(ledger.seconds.values()) == pytest.approx(expected)
    assert reported == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stage", "is_ready", "task", "use"),
    [
        (Stage.DENOISE, False, None, "start_up"),
        (Stage.DENOISE, True, None, "idle_groups"),
        (Stage.DENOISE, True, Stage.DENOISE, "denoise"),
        (Stage.DENOISE, True, Stage.DECODE, "decode"),
        (Stage.ENCODE, True, None, "idle_pools"),
        (Stage.DECODE, True, Stage.DECODE, "decode"),
    ],
)
def test_the_use_of_a_worker(stage, is_ready, task, use):
    assert use_of(stage, is_ready=is_ready, task=task) == use
    assert use in USES
