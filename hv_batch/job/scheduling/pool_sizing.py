"""How many encoders and decoders there should be where their pools are `auto`: as many as keep the groups from waiting.

Little's law: while no group waits, groups / (seconds of a denoise) samples come a second, and of a pool that keeps up
as many are at work as come during one of its tasks. Both times are means over the samples that were done last, so that
a manifest of mixed shapes needs no more care: in a mean over samples, short ones count as often as they come.

A pool grows at once, since a group that waits is several GPUs that wait. It shrinks when fewer would have done for
minutes: a text encoder that is let go has 16 GB to load before it is back, and noise must not cost that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import Resized
from hv_batch.job.stages import Stage

# Samples come in bursts, and a pool that is busy all the time never works off what has piled up.
HEADROOM = 1.1

# What a pool must have to spare, beside the headroom, to be made smaller. Means of mixed shapes vary by a few percent;
# with no gap between the two it would grow and shrink in turns.
SPARE = 1.2

RECENT = 64  # samples of a mean: a few rounds of eight groups, and soon forgotten when the manifest's shapes change
SHRINK_AFTER_S = 300.0

NAMES = {Stage.ENCODE: ("encoder", "an encoding"), Stage.DECODE: ("decoder", "a decode")}


def workers_needed(groups: float, denoise_s: float, task_s: float) -> float:
    """Workers of a pool that are busy while none of `groups` waits, and the headroom."""
    return groups / denoise_s * task_s * HEADROOM


def worker_count(workers: float, most: int) -> int:
    """Of a pool that needs so many."""
    return min(most, max(1, math.ceil(workers)))


class _Times:
    """Seconds of the last samples, and their mean."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=RECENT)
        self.mean: float | None = None

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        # The longest counts as the second longest: one task that met a store which did not answer tells nothing.
        *rest, longest = sorted(self._last)
        self.mean = (sum(rest) + min(longest, rest[-1])) / len(self._last) if rest else longest


@dataclass(slots=True)
class _Pool:
    most: int
    workers: int = 1  # before anything is known
    fewer_since: float | None = None  # fewer would do since then
    fewer: int = 0  # the most that were needed since

    def resize(self, need: float, now: float, may_shrink: bool) -> bool:
        """Whether the pool is to have another number of workers from now on."""
        wanted, fewer = worker_count(need, self.most), worker_count(need * SPARE, self.most)
        if wanted > self.workers:
            self.workers, self.fewer_since = wanted, None
            return True
        if fewer >= self.workers or not may_shrink:
            self.fewer_since = None
            return False
        if self.fewer_since is None:
            self.fewer_since, self.fewer = now, fewer
        self.fewer = max(self.fewer, fewer)
        if now - self.fewer_since < SHRINK_AFTER_S:
            return False
        self.workers, self.fewer_since = self.fewer, None
        return True


@dataclass(slots=True)
class PoolSizer:
    """The number of workers that each stage may have now: that of its limits, or what was learnt."""

    limits: Mapping[Stage, StageLimits]
    _sized: dict[Stage, _Pool] = field(init=False)
    _times: dict[Stage, _Times] = field(init=False)
    _first_denoises: _Times = field(init=False, default_factory=_Times)

    def __post_init__(self) -> None:
        self._sized = {stage: _Pool(limits.workers) for stage, limits in self.limits.items() if limits.auto}
        self._times = {stage: _Times() for stage in self.limits}

    def most(self, stage: Stage) -> int:
        return self._sized[stage].workers if stage in self._sized else self.limits[stage].workers

    def measure(self, stage: Stage, seconds: float, *, first: bool) -> None:
        """A task is done that took so long for each of its samples; `first` of a worker that had just loaded."""
        if not first:
            self._times[stage].add(seconds)
        elif stage is Stage.DENOISE:  # warm-up of a sort, but the next one is minutes away: better than nothing
            self._first_denoises.add(seconds)

    def resize(self, groups: int, now: float, *, may_shrink: bool) -> Iterator[Resized]:
        """Adapt the pools to the groups that there are; at the tail, where these go one by one, without shrinking."""
        denoise_s = self._times[Stage.DENOISE].mean or self._first_denoises.mean
        for stage, pool in self._sized.items():
            task_s, before = self._times[stage].mean, pool.workers
            if denoise_s and task_s and pool.resize(workers_needed(groups, denoise_s, task_s), now, may_shrink):
                because = f"takes {task_s:.3g} s, and a denoise {denoise_s:.3g} s in each of {groups} group(s)"
                name, task = NAMES[stage]
                yield Resized(stage, pool.workers, f"{pool.workers} {name}(s) instead of {before}: {task} {because}")
