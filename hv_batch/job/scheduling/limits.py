"""Limits of the scheduler: worker counts, queue lengths, retries, outage times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hv_batch.job.failure import FailureClass

OUTAGE_PAUSE_S = 15.0  # between two tries while the output root is unreachable
OUTAGE_LIMIT_S = 1800.0  # then the run ends; running the same command again continues from what is stored

MAX_MICRO_BATCH = 32  # samples of one task; the overhead of a task is then small even for the quickest samples


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    workers: int  # maximum; 0 for DECODE if the denoise groups decode
    auto: bool = False  # the number of workers follows measured task times (pool_sizing.py)
    is_colocated: bool = False  # the workers use the groups' resources and need none of their own
    batch: int = 1  # maximum samples of a task; after ENCODE, only quick samples share a task (micro_batches.py)
    ahead: int  # queue length in tasks; the stage before pauses if its results would exceed it
    task_timeout_s: float  # a running task without a Heartbeat for this long counts as hung
    result_bytes: float = math.inf  # object-store budget of one worker, for finished and running results
    size_classes: tuple[SizeClass, ...] = ()  # the workers by size; empty if all are alike

    @property
    def sizes(self) -> tuple[SizeClass, ...]:
        return self.size_classes or (SizeClass(ranks=1, workers=self.workers, ahead=self.ahead),)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLimits:
    """Tries of a sample for each failure class, and how many losses in a row abandon a worker slot."""

    poison: int
    oom: int
    infra: int
    preempted: int
    worker: int
    max_quarantined: int | None = None  # quarantined samples of this run that do not stop it; None: no limit

    def tries(self, kind: FailureClass) -> int:
        return {
            FailureClass.POISON: self.poison,
            FailureClass.GPU_OOM: self.oom,
            FailureClass.INFRA: self.infra,
            FailureClass.PREEMPTED: self.preempted,
        }[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeClass:
    """The denoise groups of one size."""

    ranks: int  # of one group
    workers: int  # maximum number of groups at a time
    ahead: int  # samples that may wait for these groups
    name: str = ""  # of the size, in messages; empty if there is only one
