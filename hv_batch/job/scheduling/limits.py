"""The numbers a scheduler is given: how wide each stage is, and how often what may be tried."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hv_batch.job.failure import FailureClass


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    workers: int  # at most; 0 of DECODE: the groups do its tasks too
    auto: bool = False  # how many of them there should be is learnt from how long tasks take
    is_colocated: bool = False  # they use the groups' resources, so they need none of their own
    batch: int = 1  # samples a task may take; more than one behind the encoders only of quick ones (micro_batches.py)
    ahead: int  # tasks' worth of samples that may wait here; the stage before pauses when its results would exceed it
    task_timeout_s: float  # without a Beat for so long a running task counts as hung
    result_bytes: float = math.inf  # of what one worker has made and is making, as long as the object store holds it
    size_classes: tuple[SizeClass, ...] = ()  # its workers by size; none: all are alike

    @property
    def sizes(self) -> tuple[SizeClass, ...]:
        return self.size_classes or (SizeClass(ranks=1, workers=self.workers, ahead=self.ahead),)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeClass:
    """The groups of one size."""

    ranks: int  # of a group
    workers: int  # groups at a time, at most
    ahead: int  # samples that may wait for its groups
    name: str = ""  # of the size, for people; empty where there is only one


OUTAGE_PAUSE_S = 15.0  # between two tries while the output root does not answer


OUTAGE_LIMIT_S = 1800.0  # then the run ends; everything that was stored is there for the same command


MAX_MICRO_BATCH = 32  # samples, at most: what a task costs is then a small part of what even the quickest do
