"""Progress of a run: the numbers, the estimate of the remaining time, and the records that carry both.

A progress record is an ordinary log record with a `Snapshot` in its `progress` attribute. A terminal draws a bar from
it; a log gets a line of it now and then (`ProgressThrottle`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from hv_batch.job.formatting import clock

LINE_EVERY_S = 30.0  # a job log of a night stays under a thousand lines
RECORD_EVERY_S = 0.2  # what a bar on a terminal needs; the driver's loop turns far more often

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """How far a run is."""

    total: int
    committed: int
    quarantined: int
    done_before: int  # terminal samples that this run found, of `committed` and `quarantined`
    starting: int  # workers that are being placed or load their weights
    encoding: int
    denoising: int
    decoding: int
    spooled: int = 0  # videos on the disks of nodes, while the output root does not answer
    elapsed_s: float = 0.0
    eta_s: float | None = None  # None before a second sample is done

    @property
    def terminal(self) -> int:
        return self.committed + self.quarantined

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.terminal}/{self.total} done"]
        if self.quarantined:
            parts.append(f"{self.quarantined} quarantined")
        if self.starting:
            parts.append(f"{self.starting} workers starting")
        parts.append(f"running: {self.encoding} encode, {self.denoising} denoise, {self.decoding} decode")
        if self.spooled:
            parts.append(f"{self.spooled} finished, waiting for the output root")
        parts.append(f"{clock(self.elapsed_s)} ETA {'--:--' if self.eta_s is None else clock(self.eta_s)}")
        return " · ".join(parts)


class EtaEstimator:
    """The mean rate since the first sample was done: the time of starting and loading says nothing about the rest."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def eta_s(self, snapshot: Snapshot, now: float) -> float | None:
        """Seconds to the end; None before a second sample is done."""
        done_here = snapshot.terminal - snapshot.done_before
        if self._first is None:
            self._first = (now, done_here) if done_here > 0 else None
            return None
        since, done_then = self._first
        if done_here == done_then:
            return None
        return (snapshot.total - snapshot.terminal) * (now - since) / (done_here - done_then)


class ProgressThrottle(logging.Filter):
    """Lets one progress record pass every `every_s` seconds, and every other record."""

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
    """Emits progress records of a run that begins now, at most one every `RECORD_EVERY_S`."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._eta = EtaEstimator()
        self._next = 0.0

    def log(self, snapshot: Snapshot) -> None:
        """Call as often as convenient; `elapsed_s` and `eta_s` of the snapshot are filled in here."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + RECORD_EVERY_S
        snapshot = replace(snapshot, elapsed_s=now - self._begun, eta_s=self._eta.eta_s(snapshot, now))
        logger.info("%s", snapshot, extra={"progress": snapshot})
