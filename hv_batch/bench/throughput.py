"""Measure samples per second, and the CPU time per sample summed over all processes of the run.

On a shared machine, wall time varies with the other load; CPU time is nearly the same in every run.
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
    per_second: float  # samples per second in the middle of the run, after workers start and before they are released
    cpu_ms: float | None  # CPU time per sample over all processes; None if the system does not report it

    def render(self) -> str:
        cpu = "" if self.cpu_ms is None else f", {self.cpu_ms:.1f} ms of CPU time each"
        return f"{self.per_second:.1f} per second{cpu}"


MIDDLE = (0.1, 0.9)  # fractions of the samples between which the throughput is measured


def per_second(ends: Iterable[float]) -> float:
    """Return the samples per second in the middle of a run, from the times in seconds at which its samples ended."""
    times = sorted(ends)
    first, last = (int(share * (len(times) - 1)) for share in MIDDLE)
    return (last - first) / (times[last] - times[first])


class Meter:
    """Measures CPU time per sample between the first and the last call of `read`."""

    def __init__(self) -> None:
        self._first: tuple[int, dict[int, float]] | None = None
        self._last: tuple[int, dict[int, float]] | None = None

    def read(self, samples: int) -> None:
        """Record the CPU time at which `samples` samples are done."""
        self._last = (samples, cpu_seconds())
        self._first = self._first or self._last

    def cpu_ms(self) -> float | None:
        """Return the CPU time per sample in ms, or None before two readings.

        The time of processes that ended between the readings is not included.
        """
        if self._first is None or self._last is None or self._first[0] == self._last[0]:
            return None
        (before, then), (after, now) = self._first, self._last
        taken = sum(seconds - then.get(pid, 0.0) for pid, seconds in now.items())
        return 1000 * taken / (after - before) if now else None


class ProgressMeter(logging.Handler):
    """Measures the middle of a run from its progress records, after workers start and before they are released."""

    def __init__(self) -> None:
        super().__init__()
        self._due = list(MIDDLE)  # fractions of the samples at which to read the meter
        self.meter = Meter()
        self.loop_max_s = 0.0  # longest iteration of the driver's loop, known when the run has finished

    def emit(self, record: logging.LogRecord) -> None:
        self.loop_max_s = getattr(record, "loop_max_s", self.loop_max_s)
        snapshot: Snapshot | None = getattr(record, "progress", None)
        if snapshot is None:
            return
        rendered, to_render = snapshot.terminal - snapshot.done_before, snapshot.total - snapshot.done_before
        if self._due and rendered >= self._due[0] * to_render and not snapshot.starting:
            del self._due[0]
            self.meter.read(rendered)


@contextmanager
def attached_handler(handler: logging.Handler) -> Iterator[None]:
    """Pass the log records of the package to `handler` as well within the block."""
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
    """Return the CPU time in seconds, by process id, of this process and its living descendants.

    The time of a process includes that of the children that it has reaped. The result is empty on systems other than
    Linux.
    """
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for pid, parent, taken in _processes():
        parents[pid], seconds[pid] = parent, taken
    return {pid: taken for pid, taken in seconds.items() if _is_own_or_descendant(pid, parents)}


def _is_own_or_descendant(pid: int, parents: dict[int, int]) -> bool:
    while pid not in (os.getpid(), 0):
        pid = parents.get(pid, 0)
    return pid != 0


def _processes() -> Iterator[tuple[int, int, float]]:
    """Yield (process id, parent's process id, CPU seconds) of every process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # the name may contain spaces and parentheses
        except OSError:  # the process has ended
            continue
        yield int(stat.parent.name), int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
