"""The samples in flight: each is in exactly one place, waiting at one station or in one running task."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import islice

from hv_batch.job.errors import Failure
from hv_batch.job.events import Stage
from hv_batch.job.freight import Freight


@dataclass(slots=True)
class _Sample:
    stage: Stage
    solo: bool = False  # was in a batch that failed: from now on it runs alone
    failures: list[Failure] = field(default_factory=list)


class Queues:
    """Counts are kept, not counted: a cluster of a thousand GPUs asks for them hundreds of times a second."""

    def __init__(self, freight: Freight) -> None:
        self._freight = freight  # moves with them
        self._samples: dict[str, _Sample] = {}
        self._waiting: dict[Stage, deque[str]] = {stage: deque() for stage in Stage}
        self._at: Counter[Stage] = Counter()

    def __len__(self) -> int:
        return len(self._samples)

    def places(self) -> dict[str, Stage]:
        """The station of every sample in flight."""
        return {key: sample.stage for key, sample in self._samples.items()}

    def place(self, key: str) -> Stage:
        return self._samples[key].stage

    def waiting(self, stage: Stage) -> int:
        return len(self._waiting[stage])

    def at(self, stage: Stage) -> int:
        """Samples that wait or run at the station."""
        return self._at[stage]

    def yet_to_pass(self, stage: Stage) -> int:
        """Samples in flight that the station still has to do with."""
        return sum(self._at[station] for station in Stage if station <= stage)

    def failures(self, key: str) -> list[Failure]:
        """What the sample has been charged with; the caller may add to it."""
        return self._samples[key].failures

    def admit(self, key: str, stage: Stage, latent_bytes: int) -> None:
        assert key not in self._samples, f"sample {key} admitted twice"
        self._freight.admit(key, latent_bytes)
        self._samples[key] = _Sample(stage)
        self._at[stage] += 1
        self._waiting[stage].append(key)

    def advance(self, key: str) -> None:
        """The running task has done its part of the sample."""
        stage = self._samples[key].stage
        if stage is Stage.DECODE:
            self.remove(key)
        else:
            after = Stage(stage + 1)
            self._move(key, after)
            self._waiting[after].append(key)

    def put_back(self, key: str, stage: Stage, *, first: bool) -> None:
        """The running task has failed; the sample waits at `stage` for its next try, before the others or behind."""
        self._move(key, stage)
        if first:
            self._waiting[stage].appendleft(key)
        else:
            self._waiting[stage].append(key)

    def set_apart(self, key: str) -> None:
        """From now on the sample runs alone."""
        self._samples[key].solo = True

    def remove(self, key: str) -> None:
        """The sample of a task that ran is in flight no more."""
        self._freight.keep(key, None)
        self._at[self._samples.pop(key).stage] -= 1

    def upcoming(self, stage: Stage, most: int) -> list[str]:
        """Who is next in line, if that many wait."""
        return list(islice(self._waiting[stage], most))

    def take_batch(self, stage: Stage, most: int) -> tuple[str, ...]:
        """The next samples for a task, at least one; they no longer wait."""
        queue = self._waiting[stage]
        batch = [queue.popleft()]
        while queue and len(batch) < most:
            if self._samples[batch[0]].solo or self._samples[queue[0]].solo:
                break
            batch.append(queue.popleft())
        return tuple(batch)

    def _move(self, key: str, stage: Stage) -> None:
        self._freight.keep(key, stage)
        sample = self._samples[key]
        self._at[sample.stage] -= 1
        self._at[stage] += 1
        sample.stage = stage
