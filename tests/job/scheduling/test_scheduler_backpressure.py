"""hv_batch.job.scheduling.backpressure: queues are bounded in samples and in bytes."""

from __future__ import annotations

import math

import pytest

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import (
    Admitted,
)
from hv_batch.job.scheduling.object_store_budget import ASSUMED_EMBEDDING_BYTES
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import MIB, STALL_S, World, limits


def work_without_decoding(world):
    """Let starts, encodings and denoises succeed until only decodes run."""
    for _ in range(1000):
        able = [worker for worker in world.running if worker.stage is not Stage.DECODE]
        if not (world.starting or able):
            return
        world.ready(world.starting[0]) if world.starting else world.done(able[0])
    pytest.fail("the groups never stopped")


@pytest.mark.parametrize(("share", "most"), [(math.inf, 5), (2 * MIB, 4), (1, 2)])
def test_a_slow_decoder_stops_the_groups_before_the_store_is_full(share, most):
    """P7: each of two groups has as many results as its budget allows, or one, including those being decoded."""
    stages = limits(groups=2, decoders=1, result_bytes=share) | {
        Stage.DECODE: StageLimits(workers=1, ahead=4, task_timeout_s=STALL_S)
    }
    world = World(stages, [Admitted(f"s{i}", Stage.ENCODE, MIB) for i in range(12)])
    work_without_decoding(world)
    denoised = sum(stage is Stage.DENOISE for stage, _ in world.runs)
    assert denoised == most
    world.run_to_end()
    assert len(world.committed) == 12


def test_stored_latents_take_no_budget():
    """P4, P7: latents that a decoder reads from the output root do not block a group."""
    plan = [Admitted(f"stored{i}", Stage.DECODE, MIB) for i in range(2)] + [Admitted("new", Stage.ENCODE, MIB)]
    world = World(limits(groups=1, result_bytes=MIB), plan)
    work_without_decoding(world)
    assert world.runs[Stage.DENOISE, "new"] == 1


def test_the_largest_embedding_is_the_expected_size():
    """P7: the expected size of the next embeddings is the largest size so far."""
    share = 3 * ASSUMED_EMBEDDING_BYTES
    keys = [f"s{i}" for i in range(8)]
    world = World(
        limits(groups=1, batch=4, result_bytes=share),
        [Admitted(key) for key in keys],
        embedding_bytes=dict.fromkeys(keys, share),
    )
    batches = []
    while not world.finish:
        if world.starting:
            world.ready(world.starting[0])
            continue
        worker, task = next(iter(world.running.items()))
        if worker.stage is Stage.ENCODE:
            batches.append(len(task))
        world.done(worker)
    assert batches == [3, 1, 1, 1, 1, 1]
