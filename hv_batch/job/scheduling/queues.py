"""The samples in flight: each is in exactly one place, waiting at one stage, in one running task, or set aside."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from hv_batch.job.failure import Failure
from hv_batch.job.scheduling.object_store_budget import ObjectStoreBudget
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload

STAGES = tuple(Stage)  # to walk over an enum takes ten times as long


@dataclass(slots=True)
class _Sample:
    stage: Stage
    size_class: int
    order: int  # of its admission
    latent_bytes: int
    work: Workload | None
    solo: bool = False  # was in a batch that failed: from now on it runs alone
    failures: list[Failure] = field(default_factory=list)


class Queues:
    """Up to their denoise, samples wait in size classes, one for each size of groups; then in one line.

    Counts are kept, not counted: a cluster of a thousand GPUs asks for them hundreds of times a second.
    """

    def __init__(self, store_budget: ObjectStoreBudget, size_classes: int = 1) -> None:
        self._store_budget = store_budget  # moves with them
        self._samples: dict[str, _Sample] = {}
        self._aside: dict[str, _Sample] = {}
        self._waiting: dict[Stage, list[deque[str]]] = {
            stage: [deque() for _ in range(1 if stage is Stage.DECODE else size_classes)] for stage in Stage
        }
        self._at: Counter[tuple[Stage, int | None]] = Counter()  # by size class, and of all size classes (None)
        self._admitted = 0

    def __len__(self) -> int:
        """Samples at the stages; those that are set aside are not counted, here or elsewhere."""
        return len(self._samples)

    @property
    def aside(self) -> int:
        return len(self._aside)

    def places(self) -> dict[str, Stage]:
        """The stage of every sample that is at one."""
        return {key: sample.stage for key, sample in self._samples.items()}

    def place(self, key: str) -> Stage:
        return self._samples[key].stage

    def size_classes(self, stage: Stage) -> range:
        return range(len(self._waiting[stage]))

    def waiting(self, stage: Stage, size_class: int | None = None) -> int:
        """Of all size classes, unless one is named; so with all counts."""
        lines = self._waiting[stage]
        return sum(map(len, lines)) if size_class is None else len(lines[size_class])

    def at(self, stage: Stage, size_class: int | None = None) -> int:
        """Samples that wait or run at the stage."""
        return self._at[stage, size_class]

    def yet_to_pass(self, stage: Stage, size_class: int | None = None) -> int:
        """Samples in flight that the stage still has to do with."""
        return sum(self._at[passed, size_class] for passed in STAGES[: stage + 1])

    def oldest(self, stage: Stage, size_classes: Iterable[int]) -> int | None:
        """Of these size classes, the one whose next sample has been in flight longest; None where none waits."""
        lines = {size_class: self._waiting[stage][size_class] for size_class in size_classes}
        waiting = [size_class for size_class, line in lines.items() if line]
        return min(waiting, key=lambda size_class: self._samples[lines[size_class][0]].order, default=None)

    def failures(self, key: str) -> list[Failure]:
        """What the sample has been charged with; the caller may add to it."""
        return self._samples[key].failures

    def work(self, key: str) -> Workload | None:
        return self._samples[key].work

    def admit(self, key: str, stage: Stage, latent_bytes: int, size_class: int, work: Workload | None) -> None:
        assert key not in self._samples, f"sample {key} admitted twice"
        self._admitted += 1
        self._enter(key, _Sample(stage, size_class, self._admitted, latent_bytes, work))

    def advance(self, key: str) -> None:
        """The running task has done its part of the sample."""
        stage = self._samples[key].stage
        if stage is Stage.DECODE:
            self.remove(key)
        else:
            self._move(key, Stage(stage + 1))
            self._line(key).append(key)

    def put_back(self, key: str, stage: Stage, *, first: bool) -> None:
        """The running task has failed; the sample waits at `stage` for its next try, before the others or behind."""
        self._move(key, stage)
        if first:
            self._line(key).appendleft(key)
        else:
            self._line(key).append(key)

    def run_alone(self, key: str) -> None:
        """From now on the sample runs alone."""
        self._samples[key].solo = True

    def remove(self, key: str) -> None:
        """The sample of a task that ran is in flight no more."""
        self._store_budget.keep(key, None)
        self._count(key, -1)
        del self._samples[key]

    def set_aside(self, key: str) -> None:
        """The sample of a task that ran is at no stage: there is nothing to do for it, and it holds nothing."""
        sample = self._samples[key]
        self.remove(key)
        self._aside[key] = sample

    def take_up(self, key: str, stage: Stage) -> None:
        """There is something to do for it again."""
        sample = self._aside.pop(key)
        sample.stage = stage
        self._enter(key, sample)

    def drop(self, key: str) -> None:
        """What was set aside is in flight no more."""
        del self._aside[key]

    def upcoming(self, stage: Stage, size_class: int, most: int) -> list[str]:
        """Who is next in line, if that many wait."""
        return list(islice(self._waiting[stage][size_class], most))

    def take_batch(self, stage: Stage, size_class: int, most: int) -> tuple[str, ...]:
        """The next samples for a task, at least one; they no longer wait."""
        queue = self._waiting[stage][size_class]
        batch = [queue.popleft()]
        while queue and len(batch) < most:
            if self._samples[batch[0]].solo or self._samples[queue[0]].solo:
                break
            batch.append(queue.popleft())
        return tuple(batch)

    def _enter(self, key: str, sample: _Sample) -> None:
        self._store_budget.admit(key, sample.latent_bytes)
        self._samples[key] = sample
        self._count(key, 1)
        self._line(key).append(key)

    def _move(self, key: str, stage: Stage) -> None:
        self._store_budget.keep(key, stage)
        self._count(key, -1)
        self._samples[key].stage = stage
        self._count(key, 1)

    def _count(self, key: str, change: int) -> None:
        sample = self._samples[key]
        self._at[sample.stage, sample.size_class] += change
        self._at[sample.stage, None] += change

    def _line(self, key: str) -> deque[str]:
        sample = self._samples[key]
        return self._waiting[sample.stage][0 if sample.stage is Stage.DECODE else sample.size_class]
