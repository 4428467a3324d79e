"""The size of `auto` pools: as many encoders and decoders as it takes to keep the denoise groups busy.

By Little's law: while no group waits, groups / (seconds of a denoise) samples arrive each second, and a pool that keeps
up is busy with as many samples as arrive during one of its tasks. Both times are means over recent samples. A mean over
samples weights each shape by its frequency, so mixed shapes need no special treatment.

A pool grows at once, because each waiting group leaves several GPUs idle. It shrinks only after a smaller pool would
have been enough for minutes, because a restarted text encoder loads 16 GB and noise must not cause that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import Resized
from hv_batch.job.stages import Stage

# Samples arrive in bursts, and a pool that is always busy never catches up.
HEADROOM = 1.1

# A pool shrinks only if it is still sufficient for this multiple of the need, headroom included. Means of mixed shapes
# vary by a few percent; without a gap the pool would oscillate.
SPARE = 1.2

RECENT = 64  # samples of a mean: a few rounds of eight groups, and quickly replaced if the manifest's shapes change
SHRINK_AFTER_S = 300.0

NAMES = {Stage.ENCODE: ("encoder", "an encoding"), Stage.DECODE: ("decoder", "a decode")}


def workers_needed(groups: float, denoise_s: float, task_s: float) -> float:
    """Workers of a pool that keep `groups` busy, with headroom, if a denoise and a task take this many seconds."""
    return groups / denoise_s * task_s * HEADROOM


def worker_count(workers: float, most: int) -> int:
    """`workers` rounded up to a whole number from 1 to `most`."""
    return min(most, max(1, math.ceil(workers)))


class _RecentTimes:
    """Seconds of the recent samples, and their mean."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.mean: float | None = None

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        # The longest time counts as the second longest, so that a single outlier (an unreachable store) has no effect.
        *rest, longest = sorted(self._recent)
        self.mean = (sum(rest) + min(longest, rest[-1])) / len(self._recent) if rest else longest


@dataclass(slots=True)
class _Pool:
    most: int
    workers: int = 1  # until task times are known
    fewer_since: float | None = None  # since when a smaller pool would be enough
    fewer: int = 0  # the largest size needed since then

    def resize(self, need: float, now: float, may_shrink: bool) -> bool:
        """Adapt `workers` to the need. Returns whether it changed."""
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
    """The maximum number of workers of each stage: its configured limit or, for an `auto` pool, the measured need."""

    limits: Mapping[Stage, StageLimits]
    _pools: dict[Stage, _Pool] = field(init=False)
    _times: dict[Stage, _RecentTimes] = field(init=False)
    _first_denoises: _RecentTimes = field(init=False, default_factory=_RecentTimes)

    def __post_init__(self) -> None:
        self._pools = {stage: _Pool(limits.workers) for stage, limits in self.limits.items() if limits.auto}
        self._times = {stage: _RecentTimes() for stage in self.limits}

    def most(self, stage: Stage) -> int:
        return self._pools[stage].workers if stage in self._pools else self.limits[stage].workers

    def measure(self, stage: Stage, seconds: float, *, first: bool) -> None:
        """Record a task that took `seconds` for each of its samples. `first`: it includes the worker's warm-up."""
        if not first:
            self._times[stage].add(seconds)
        elif stage is Stage.DENOISE:  # a rough estimate until later denoises end, which takes minutes
            self._first_denoises.add(seconds)

    def resize(self, groups: int, now: float, *, may_shrink: bool) -> Iterator[Resized]:
        """Adapt the `auto` pools to the number of placed groups.

        The scheduler passes `may_shrink=False` at the tail of a run, when groups are released one by one.
        """
        denoise_s = self._times[Stage.DENOISE].mean or self._first_denoises.mean
        for stage, pool in self._pools.items():
            task_s, before = self._times[stage].mean, pool.workers
            if denoise_s and task_s and pool.resize(workers_needed(groups, denoise_s, task_s), now, may_shrink):
                name, task = NAMES[stage]
                times = f"{task} takes {task_s:.3g} s, and a denoise {denoise_s:.3g} s in each of {groups} group(s)"
                yield Resized(stage, pool.workers, f"{pool.workers} {name}(s) instead of {before}: {times}")
