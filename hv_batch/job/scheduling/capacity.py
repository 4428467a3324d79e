"""How many workers and queue places a config gives each stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from hv_batch.job.config.group_rules import most_ranks
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.scheduling.limits import MAX_MICRO_BATCH, RetryLimits, SizeClass, StageLimits
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan

# Of an `auto` pool, for each group. Encoding is a small part of a denoise, even of an image. A decode may take longer
# than a denoise of few steps on eight GPUs; if it takes more than twice as long, uploads or disks are slow, and more
# decoders would only wait with the others.
MOST_A_GROUP = {Stage.ENCODE: 1, Stage.DECODE: 2}


def most_workers(config: RunConfig, plans: Sequence[ParallelPlan] = (ParallelPlan(),)) -> dict[Stage, int]:
    """Workers that a stage may ever have; with groups of several sizes, if all were of the smallest."""
    groups = config.groups
    most_groups = groups.count * plans[0].world_size // plans[-1].world_size
    most = _pool_sizes(config, most_groups) | {Stage.DENOISE: most_groups}
    if config.decoders.placement == "group":
        most[Stage.DECODE] = 0
    if config.encoders.is_colocated:
        room = colocated_per_node(config) * groups.count * groups.nodes_per_group
        most[Stage.ENCODE] = min(most[Stage.ENCODE], room)
    return most


def colocated_per_node(config: RunConfig) -> int:
    """How many colocated encoders a node of a group may hold: at most one for each of the group's GPUs there."""
    if not config.encoders.is_colocated:
        return 0
    groups = config.groups
    wanted = _pool_sizes(config, groups.count)[Stage.ENCODE]
    return min(
        most_ranks(config.parallel) // groups.nodes_per_group, -(-wanted // (groups.count * groups.nodes_per_group))
    )


def _pool_sizes(config: RunConfig, groups: int) -> dict[Stage, int]:
    counts = {Stage.ENCODE: config.encoders.count, Stage.DECODE: config.decoders.count}
    return {stage: MOST_A_GROUP[stage] * groups if count == "auto" else count for stage, count in counts.items()}


def stage_limits(
    config: RunConfig, result_bytes: Mapping[Stage, float], plans: Sequence[ParallelPlan] = (ParallelPlan(),)
) -> dict[Stage, StageLimits]:
    """`result_bytes`: what the results of one worker may hold of the object store, for stages where that is bounded.
    `plans` are those of the groups, largest first; where there is but one, it is the same which.

    Queues hold one task a worker beyond the running one: enough that none waits, and a bounded loss of work. The one
    before the groups holds a batch besides, which can be encoded whole while every group still has a sample.

    What the groups are still making counts as queued for the decoders, so these have one more a group: groups that
    began together end together, and would stand idle for a decode each time.
    """
    stall_s = config.timeouts.stall_s
    batch = config.encoders.batch_size
    workers, size_classes = most_workers(config, plans), tuple(_size_classes(config, plans))
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
    """Groups of every size may take all the ranks that `groups.count` of the largest have."""
    for plan in plans:
        workers = config.groups.count * plans[0].world_size // plan.world_size
        name = f"denoise group of {plan.world_size} rank(s)" if len(plans) > 1 else ""
        yield SizeClass(ranks=plan.world_size, workers=workers, ahead=workers + config.encoders.batch_size, name=name)


def retry_limits(config: RunConfig) -> RetryLimits:
    return RetryLimits(**config.retries.model_dump())
