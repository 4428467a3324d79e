"""Progress of a run: the counts, the estimate of the remaining time, and the log records with both.

A progress record is a log record with a `Snapshot` in its attribute `progress`. On a terminal the handler draws a bar
from it; other handlers write it at a low rate (`ProgressThrottle`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from hv_batch.job.formatting import clock

LINE_EVERY_S = 30.0  # a job log of a night stays under a thousand lines
RECORD_EVERY_S = 0.2  # a smooth bar needs no more; the driver's loop iterates much more often

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The counts of a run's samples and workers at one time."""

    total: int
    committed: int
    quarantined: int
    done_before: int  # of `committed` and `quarantined`, the samples done by earlier commands
    starting: int  # workers that wait for resources or load their weights
    encoding: int
    denoising: int
    decoding: int
    spooled: int = 0  # finished videos on the disks of nodes, because the output root does not answer
    elapsed_s: float = 0.0
    eta_s: float | None = None  # None before a second sample is done
    samples_per_s: float | None = None  # likewise

    @property
    def terminal(self) -> int:
        return self.committed + self.quarantined

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        percent = 100 * self.terminal // max(1, self.total)
        eta = "--:--" if self.eta_s is None else clock(self.eta_s)
        parts = [f"{percent}%", _rate(self.samples_per_s), f"ETA {eta}", f"{self.terminal}/{self.total} done"]
        if self.quarantined:
            parts.append(f"{self.quarantined} quarantined")
        if self.starting:
            parts.append(f"{self.starting} workers starting")
        parts.append(f"running: {self.encoding} encode, {self.denoising} denoise, {self.decoding} decode")
        if self.spooled:
            parts.append(f"{self.spooled} finished, waiting for the output root")
        parts.append(f"{clock(self.elapsed_s)} elapsed")
        return " · ".join(parts)


def _rate(per_s: float | None) -> str:
    """Samples per minute, or per hour if that is less than one per minute."""
    if per_s is None:
        return "--/min"
    return f"{60 * per_s:.3g}/min" if 60 * per_s >= 1 else f"{3600 * per_s:.3g}/h"


class EtaEstimator:
    """Estimates the remaining time from the mean rate since the first sample was done, so without the start."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def eta_s(self, snapshot: Snapshot, now: float) -> float | None:
        """Seconds until all samples are done; None before a second sample is done. `now` is a monotonic time."""
        per_s = self.samples_per_s(snapshot, now)
        if per_s is None:
            return None
        # More samples done than there are: an earlier run has left records that this run has not selected.
        left = max(0, snapshot.total - snapshot.terminal)
        return left / per_s if left else 0.0

    def samples_per_s(self, snapshot: Snapshot, now: float) -> float | None:
        """The mean rate since the first sample was done; None before a second sample is done."""
        done_here = snapshot.terminal - snapshot.done_before
        if self._first is None:
            self._first = (now, done_here) if done_here > 0 else None
            return None
        since, done_then = self._first
        if done_here < done_then:  # the counts of another run: the estimate begins again
            self._first = (now, done_here) if done_here > 0 else None
            return None
        if done_here == done_then or now <= since:
            return None
        return (done_here - done_then) / (now - since)


class ProgressThrottle(logging.Filter):
    """Passes at most one progress record per `every_s` seconds, and all other records."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        super().__init__()
        self._every_s = every_s
        self._last: float | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "progress"):
            return True
        if self._last is not None and record.created - self._last < self._every_s:
            return False
        self._last = record.created
        return True


class ProgressLog:
    """Emits the progress records of a run that starts now, at most one per `RECORD_EVERY_S`."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._eta = EtaEstimator()
        self._next = 0.0

    def log(self, snapshot: Snapshot) -> Snapshot | None:
        """May be called at any rate. Sets `elapsed_s` and `eta_s` of the snapshot. Returns it if a record is due."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + RECORD_EVERY_S
        rate, eta_s = self._eta.samples_per_s(snapshot, now), self._eta.eta_s(snapshot, now)
        snapshot = replace(snapshot, elapsed_s=now - self._begun, eta_s=eta_s, samples_per_s=rate)
        logger.info("%s", snapshot, extra={"progress": snapshot})
        return snapshot
