"""The scheduler's limits that follow from a config: workers, queue places, batches and timeouts of each stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.scheduling.limits import MAX_MICRO_BATCH, RetryLimits, SizeClass, StageLimits
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan


def stage_limits(
    config: RunConfig,
    workers: Mapping[Stage, int],
    plans: Sequence[ParallelPlan],
    result_bytes: Mapping[Stage, float],
) -> dict[Stage, StageLimits]:
    """The limits of every stage.

    `workers` is the maximum number of workers of each stage; 0 decoders if the groups decode. `plans` are those of the
    groups, largest first. `result_bytes` is how many bytes of the object store the results of one worker may take, for
    the stages that are bounded.

    A queue holds one task per worker beyond the running one: enough that no worker waits, and little work to lose. The
    queue before the groups also holds one encoder batch, which can be encoded whole while every group still has a
    sample.

    Samples in the groups count as queued for the decoders, so that queue has one more place per group: groups that
    start together finish together, and would be idle during a decode each time.
    """
    stall_s = config.timeouts.stall_s
    batch = config.encoders.batch_size
    size_classes = tuple(_size_classes(config, plans))
    groups = workers[Stage.DENOISE]
    return {
        Stage.ENCODE: StageLimits(
            workers=workers[Stage.ENCODE],
            auto=config.encoders.count == "auto",
            is_colocated=config.encoders.is_colocated,
            batch=batch,
            ahead=batch,
            task_timeout_s=stall_s,
            result_bytes=result_bytes.get(Stage.ENCODE, math.inf),
        ),
        Stage.DENOISE: StageLimits(
            workers=groups,
            batch=MAX_MICRO_BATCH,
            ahead=sum(size_class.ahead for size_class in size_classes),
            task_timeout_s=stall_s,
            result_bytes=result_bytes.get(Stage.DENOISE, math.inf),
            size_classes=size_classes,
        ),
        Stage.DECODE: StageLimits(
            workers=workers[Stage.DECODE],
            auto=config.decoders.count == "auto" and workers[Stage.DECODE] > 0,
            batch=MAX_MICRO_BATCH if workers[Stage.DECODE] else 1,  # all ranks of a group decode one video together
            ahead=groups + max(groups, workers[Stage.DECODE]),
            task_timeout_s=stall_s,
        ),
    }


def _size_classes(config: RunConfig, plans: Sequence[ParallelPlan]) -> Iterator[SizeClass]:
    """Groups of each size may use all the ranks of `groups.count` groups of the largest size."""
    for plan in plans:
        workers = config.groups.count * plans[0].world_size // plan.world_size
        name = f"denoise group of {plan.world_size} rank(s)" if len(plans) > 1 else ""
        yield SizeClass(ranks=plan.world_size, workers=workers, ahead=workers + config.encoders.batch_size, name=name)


def retry_limits(config: RunConfig, samples: int) -> RetryLimits:
    """The limits of a run of `samples` samples, of which `retries.max_quarantined` may be a share."""
    limits = config.retries.model_dump()
    if isinstance(most := limits["max_quarantined"], float):
        limits["max_quarantined"] = int(most * samples)
    return RetryLimits(**limits)
