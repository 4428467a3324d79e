"""When samples became terminal: progress over time, the recent rate, and the remaining time.

The unix times of the records are counted in bins, which become wider with the range of the times, so the memory is
bounded. The result does not depend on the order of the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

MAX_BINS = 8192
MAX_POINTS = 500

RECENT_S = 3600.0  # the rate is that of this time
MIN_RECENT = 2  # samples in it
PAUSE_S = 1800.0  # a longer time without a finished sample is not work, unless the events say so

Point = list[int]


class TimeBins:
    """A number of events by time. A bin begins at a multiple of its width, which is a power of two seconds."""

    def __init__(self) -> None:
        self.width = 1
        self.counts: Counter[int] = Counter()

    def add(self, times: Iterable[float]) -> None:
        self.counts.update(int(time) // self.width for time in times)
        self.widen_to(self.width)

    def merge(self, other: TimeBins) -> None:
        self.widen_to(other.width)
        for number, count in other.counts.items():
            self.counts[number * other.width // self.width] += count
        self.widen_to(self.width)

    def widen_to(self, width: int) -> None:
        """Make bins at least `width` wide, and so wide that there are at most MAX_BINS."""
        while self.width < width or len(self.counts) > MAX_BINS:
            wider: Counter[int] = Counter()
            for number, count in self.counts.items():
                wider[number // 2] += count
            self.width, self.counts = 2 * self.width, wider

    def until(self, ends: Sequence[float]) -> list[int]:
        """The number of events in the bins that begin before each of `ends`, which ascend."""
        ordered = sorted(self.counts.items())
        totals, at, total = [], 0, 0
        for end in ends:
            while at < len(ordered) and ordered[at][0] * self.width < end:
                total += ordered[at][1]
                at += 1
            totals.append(total)
        return totals

    def starts(self) -> Iterator[float]:
        """The begin of each bin with an event, in order."""
        return (float(number * self.width) for number in sorted(self.counts))

    @property
    def range(self) -> tuple[float, float] | None:
        """The begin of the first bin, and the end of the last."""
        if not self.counts:
            return None
        return min(self.counts) * self.width, (max(self.counts) + 1) * self.width


class Pace:
    """The progress of a run of `samples` samples, `withdrawn` of which are withdrawn."""

    def __init__(self, committed: TimeBins, quarantined: TimeBins, samples: int, withdrawn: int) -> None:
        self._committed = committed
        self._quarantined = quarantined
        self._samples = samples - withdrawn

    def points(self, since: float | None = None) -> list[Point]:
        """[unix time, committed, quarantined, pending] at up to MAX_POINTS times, from `since` to the last record."""
        ranges = [bins.range for bins in (self._committed, self._quarantined) if bins.range]
        if not ranges:
            return []
        begin, end = min(first for first, _ in ranges), max(last for _, last in ranges)
        begin = min(begin, since) if since is not None else begin
        step = max(1.0, (end - begin) / (MAX_POINTS - 1))
        times = list(accumulate([begin] + [step] * int((end - begin) / step)))[: MAX_POINTS - 1]
        times += [end] if times[-1] < end else []
        committed, quarantined = self._committed.until(times), self._quarantined.until(times)
        points: list[Point] = []
        for time, good, bad in zip(times, committed, quarantined, strict=True):
            point = [round(time), good, bad, max(0, self._samples - good - bad)]
            if len(points) > 1 and points[-1][1:] == points[-2][1:] == point[1:]:
                points.pop()  # nothing has changed: the ends of a flat line are enough
            points.append(point)
        return points

    def rate(self, now: float) -> float | None:
        """Samples per second in the last RECENT_S before `now`; None if there were fewer than MIN_RECENT."""
        done, first = 0, now
        for bins in (self._committed, self._quarantined):
            for number, count in bins.counts.items():
                if now - RECENT_S <= (at := number * bins.width) <= now:
                    done += count
                    first = min(first, at)
        # From the first of them on: its own time is before it, so it does not count.
        return (done - 1) / (now - first) if done >= MIN_RECENT and now > first else None

    def eta_s(self, now: float, pending: int) -> float | None:
        """Seconds until no sample is pending; None without a rate."""
        if pending == 0:
            return 0.0
        rate = self.rate(now)
        return pending / rate if rate else None


def join(ranges: Iterable[tuple[float, float]], gap: float = 0.0) -> list[tuple[float, float]]:
    """The union of time ranges, with gaps of at most `gap` closed."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined
