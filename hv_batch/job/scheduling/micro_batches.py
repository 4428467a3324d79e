"""Micro-batches: how many quick samples one task takes.

A task has a fixed cost of some milliseconds on its worker and on the driver. That is negligible for a video, but most
of the time of a small image. So samples that are measured to be quick are denoised, and decoded, several in one task.
A task takes at most MICRO_BATCH_SECONDS of such samples, which bounds what a lost task costs and how long others wait.

The estimate of a sample is how long samples of equal workload (shape, steps, guidance branches) took last at the stage.
A sample of unknown workload, or of one that takes longer, is the only sample of its task.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from hv_batch.job.scheduling.limits import MAX_MICRO_BATCH
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload

MICRO_BATCH_SECONDS = 0.5  # short enough to go unnoticed, and to need no step checkpoint
RECENT_TASKS = 16  # of a stage, that determine the typical batch size
DECAY = 0.9  # an estimate falls at most by this factor for each quicker task, so that one quick task is no proof
MAX_WORKLOADS = 1000  # estimates held


class MicroBatcher:
    """Sizes the tasks of DENOISE and DECODE. The batches of the text encoders are configured instead."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Stage, Workload | None], float] = {}
        self._recent: dict[Stage, deque[float]] = {}
        self._typical: dict[Stage, int] = {}  # batch sizes

    def measure(self, stage: Stage, work: Sequence[Workload | None], seconds: float) -> None:
        """Record a task that took `seconds` for each of its samples. Mixed workloads update no estimate."""
        recent = self._recent.setdefault(stage, deque(maxlen=RECENT_TASKS))
        recent.append(seconds)
        mean = sum(recent) / len(recent)
        typical = int(min(MAX_MICRO_BATCH, MICRO_BATCH_SECONDS / mean)) if mean > 0 else MAX_MICRO_BATCH
        self._typical[stage] = max(1, typical)
        if len(set(work)) == 1:
            workload = (stage, work[0])
            self._seconds[workload] = max(seconds, DECAY * self._seconds.pop(workload, 0.0))
            if len(self._seconds) > MAX_WORKLOADS:
                del self._seconds[next(iter(self._seconds))]  # the least recently measured

    def batch_size(self, stage: Stage, work: Iterable[Workload | None]) -> int:
        """How many of these samples, in order, one task should take: at least one, unless `work` is empty."""
        seconds, count = 0.0, 0
        for each in work:
            seconds += self._seconds.get((stage, each), math.inf)
            if count == MAX_MICRO_BATCH or (count and seconds > MICRO_BATCH_SECONDS):
                break
            count += 1
        return count

    def typical_batch_size(self, stage: Stage) -> int:
        """The batch size of recent tasks of the stage; queue lengths are multiples of it."""
        return self._typical.get(stage, 1)
