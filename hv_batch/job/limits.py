"""The numbers a scheduler is given: how wide each station is, and how often what may be tried."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hv_batch.job.config import RunConfig
from hv_batch.job.errors import FailureClass
from hv_batch.job.events import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    workers: int  # at most
    auto: bool = False  # how many of them there should be is learnt from how long tasks take
    batch: int = 1  # samples a task may take
    ahead: int  # samples that may wait here; the station before pauses when its results would exceed them
    task_timeout_s: float  # without a Beat for so long a running task counts as hung
    result_bytes: float = math.inf  # of what one worker has made and is making, as long as the object store holds it


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLimits:
    """How many tries a sample has for each class of failure, and how often in a row one worker slot may be lost."""

    poison: int
    oom: int
    infra: int
    preempted: int
    worker: int

    def tries(self, kind: FailureClass) -> int:
        return {
            FailureClass.POISON: self.poison,
            FailureClass.GPU_OOM: self.oom,
            FailureClass.INFRA: self.infra,
            FailureClass.PREEMPTED: self.preempted,
        }[kind]


# Of an `auto` pool, for each group. Encoding is a small part of a denoise, even of an image; where it takes longer, the
# embedding cache is slow. A decode may take longer than a denoise of few steps on eight GPUs; where it takes more than
# twice as long, uploads or disks are slow. More GPUs would only wait with the others.
MOST_A_GROUP = {Stage.ENCODE: 1, Stage.DECODE: 2}


def most_workers(config: RunConfig) -> dict[Stage, int]:
    """Workers that a station may ever have."""
    groups = config.groups.count
    pools = {Stage.ENCODE: config.encoders.count, Stage.DECODE: config.decoders.count}
    most = {stage: MOST_A_GROUP[stage] * groups if count == "auto" else count for stage, count in pools.items()}
    return {**most, Stage.DENOISE: groups}


def stage_limits(config: RunConfig, result_bytes: Mapping[Stage, float]) -> dict[Stage, StageLimits]:
    """`result_bytes`: what the results of one worker may hold of the object store, for stations where that is bounded.

    Queues hold one task a worker beyond the running one: enough that none waits, and a bounded loss of work.

    What the groups are still making counts as queued for the decoders, so these have one more a group: groups that
    began together end together, and would stand idle for a decode each time.
    """
    stall_s = config.timeouts.stall_s
    batch = config.encoders.batch_size
    workers = most_workers(config)
    return {
        Stage.ENCODE: StageLimits(
            workers=workers[Stage.ENCODE],
            auto=config.encoders.count == "auto",
            batch=batch,
            ahead=batch,
            task_timeout_s=stall_s,
            result_bytes=result_bytes.get(Stage.ENCODE, math.inf),
        ),
        Stage.DENOISE: StageLimits(
            workers=config.groups.count,
            ahead=max(config.groups.count, batch),
            task_timeout_s=stall_s,
            result_bytes=result_bytes.get(Stage.DENOISE, math.inf),
        ),
        Stage.DECODE: StageLimits(
            workers=workers[Stage.DECODE],
            auto=config.decoders.count == "auto",
            ahead=config.groups.count + max(config.groups.count, workers[Stage.DECODE]),
            task_timeout_s=stall_s,
        ),
    }


def retry_limits(config: RunConfig) -> RetryLimits:
    return RetryLimits(**config.retries.model_dump())
