"""Quick samples travel together: how many of them one task takes.

A task costs its worker and the driver some milliseconds, whatever is in it. That is nothing beside a video, and most of
the time of a small picture. So samples that are known to be quick are denoised, and decoded, several by one task: no
more than take MICRO_BATCH_SECONDS together. A task that is lost, or waited for, is never worth more than that.

What is known is how long samples of equal work (shape, steps, branches of guidance) took last at the stage. Until
then, and where it was long, a sample travels alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from hv_batch.job.scheduling.limits import MAX_MICRO_BATCH
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload

MICRO_BATCH_SECONDS = 0.5  # nobody at a terminal notices, and no step checkpoint would be worth writing
RECENT = 16  # tasks that tell what is usual
FORGET = 0.9  # of what a kind of work took, when it takes less: one lucky task is no promise
MOST_KINDS = 1000  # of work, that are remembered


class MicroBatcher:
    """Of all stages but the text encoders, whose batches are for their GPUs."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Stage, Workload | None], float] = {}
        self._recent: dict[Stage, deque[float]] = {}

    def measure(self, stage: Stage, work: Sequence[Workload | None], seconds: float) -> None:
        """A task took so many seconds for each of its samples. One of unequal samples tells nothing of any."""
        self._recent.setdefault(stage, deque(maxlen=RECENT)).append(seconds)
        if len(set(work)) == 1:
            kind = (stage, work[0])
            self._seconds[kind] = max(seconds, FORGET * self._seconds.pop(kind, 0.0))
            if len(self._seconds) > MOST_KINDS:
                del self._seconds[next(iter(self._seconds))]  # measured longest ago

    def fitting(self, stage: Stage, work: Iterable[Workload | None]) -> int:
        """How many of these samples, in order, one task should take: at least one, if there is any."""
        seconds, count = 0.0, 0
        for each in work:
            seconds += self._seconds.get((stage, each), math.inf)
            if count == MAX_MICRO_BATCH or (count and seconds > MICRO_BATCH_SECONDS):
                break
            count += 1
        return count

    def usual(self, stage: Stage) -> int:
        """How many samples a task takes as things are: what a queue that holds a task must hold."""
        if not (recent := self._recent.get(stage)):
            return 1
        mean = sum(recent) / len(recent)
        return max(1, int(min(MAX_MICRO_BATCH, MICRO_BATCH_SECONDS / mean))) if mean > 0 else MAX_MICRO_BATCH
