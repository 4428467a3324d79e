"""Demand: how many workers the samples in flight can keep busy, and which stage is the bottleneck."""

from __future__ import annotations

from collections.abc import Mapping

from hv_batch.job.scheduling.backpressure import Backpressure
from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.scheduling.workers.scaling import WorkerScaling
from hv_batch.job.stages import STAGES, Stage


def needed_workers(
    limits: Mapping[Stage, StageLimits], queues: Queues, scaling: WorkerScaling, *, is_draining: bool
) -> dict[Stage, int]:
    """How many workers of each stage the samples in flight can keep busy at most."""
    if is_draining:
        # A drain starts no encoding and no denoise, but decodes the samples that are denoised.
        needed = {stage: scaling.count_busy(stage) for stage in STAGES}
        needed[Stage.DECODE] += needed[Stage.DENOISE] + queues.waiting(Stage.DECODE)
    else:
        needed = {stage: queues.at_or_before(stage) for stage in STAGES}
    if not limits[Stage.DECODE].workers:  # the groups decode, so they are needed until the last decode
        needed |= {Stage.DENOISE: needed[Stage.DECODE], Stage.DECODE: 0}
    return needed


def needed_groups(limits: Mapping[Stage, StageLimits], queues: Queues, *, is_draining: bool) -> list[int]:
    """How many groups of each size class the samples in flight can keep busy at most."""
    needed = []
    for size_class in queues.size_classes(Stage.DENOISE):
        if is_draining:
            denoises = queues.at(Stage.DENOISE, size_class) - queues.waiting(Stage.DENOISE, size_class)
        else:
            denoises = queues.at_or_before(Stage.DENOISE, size_class)
        decodes = 0 if limits[Stage.DECODE].workers else queues.at(Stage.DECODE, size_class)
        needed.append(denoises + decodes)
    return needed


def find_bottleneck(queues: Queues, scaling: WorkerScaling, backpressure: Backpressure) -> Stage | None:
    """The stage that keeps groups idle: DECODE if their results are not taken, ENCODE if they have no samples."""
    has_work = queues.waiting(Stage.DENOISE) > 0
    if backpressure.room_after(Stage.DENOISE) <= 0:
        return Stage.DECODE
    if not has_work:
        return Stage.ENCODE
    idle = list(scaling.idle(Stage.DENOISE))
    can_start = any(backpressure.batch_size_for(slot.id, Stage.DENOISE, slot.size_class) for slot in idle)
    return Stage.DECODE if idle and not can_start else None
