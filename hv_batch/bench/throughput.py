"""How fast samples come, and what each costs: by the clock, and in CPU time over all processes.

On a machine that does other things too, the clock says how busy it is; CPU time says much the same every time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hv_batch.job.log_records import PACKAGE
from hv_batch.job.progress import Snapshot


@dataclass(frozen=True, slots=True)
class Throughput:
    per_second: float  # samples, in the middle of the run: workers start before, and are let go after
    cpu_ms: float | None  # a sample there, over all processes; None where the system does not tell

    def render(self) -> str:
        cpu = "" if self.cpu_ms is None else f", {self.cpu_ms:.1f} ms of CPU each"
        return f"{self.per_second:.1f} a second{cpu}"


MIDDLE = (0.1, 0.9)  # of the samples


def per_second(ends: Iterable[float]) -> float:
    """At which samples came that ended at these times, in the middle."""
    times = sorted(ends)
    first, last = (int(share * (len(times) - 1)) for share in MIDDLE)
    return (last - first) / (times[last] - times[first])


class Meter:
    """The CPU time that samples cost: `read` it when some are done, and again when more are."""

    def __init__(self) -> None:
        self._first: tuple[int, dict[int, float]] | None = None
        self._last: tuple[int, dict[int, float]] | None = None

    def read(self, samples: int) -> None:
        """So many are done by now."""
        self._last = (samples, cpu_seconds())
        self._first = self._first or self._last

    def cpu_ms(self) -> float | None:
        """Of one sample, without what processes took that ended in between; None before two readings."""
        if self._first is None or self._last is None or self._first[0] == self._last[0]:
            return None
        (before, then), (after, now) = self._first, self._last
        taken = sum(seconds - then.get(pid, 0.0) for pid, seconds in now.items())
        return 1000 * taken / (after - before) if now else None


class ProgressMeter(logging.Handler):
    """Measures the middle of a run by its progress records: workers start before it, and are released after it."""

    def __init__(self) -> None:
        super().__init__()
        self._due = list(MIDDLE)  # parts of the samples at which to read the meter
        self.meter = Meter()

    def emit(self, record: logging.LogRecord) -> None:
        snapshot: Snapshot | None = getattr(record, "progress", None)
        if snapshot is None:
            return
        rendered, to_render = snapshot.terminal - snapshot.done_before, snapshot.total - snapshot.done_before
        if self._due and rendered >= self._due[0] * to_render and not snapshot.starting:
            del self._due[0]
            self.meter.read(rendered)


@contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    """Give the records of the package to `handler` as well."""
    logger = logging.getLogger(PACKAGE)
    level = logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def cpu_seconds() -> dict[int, float]:
    """By process id, what this process and all below it that live have taken, with those they have waited for; empty
    but on Linux.
    """
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for pid, parent, taken in _processes():
        parents[pid], seconds[pid] = parent, taken
    return {pid: taken for pid, taken in seconds.items() if _is_ours(pid, parents)}


def _is_ours(pid: int, parents: dict[int, int]) -> bool:
    while pid not in (os.getpid(), 0):
        pid = parents.get(pid, 0)
    return pid != 0


def _processes() -> Iterator[tuple[int, int, float]]:
    """Each one's id, its parent's, and its seconds."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # the name before may hold spaces and brackets
        except OSError:  # it has ended since
            continue
        yield int(stat.parent.name), int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
