"""Joins the tasks of each worker into spans of time, so that their number does not grow with that of the samples.

A task of a toy takes milliseconds, one of a 720p video ten minutes. A span ends at a pause of PAUSE_S between two
tasks, but the spans of a worker are at least an interval apart, which grows with the time (`Pace`) and with the number
of workers: together they end about 10,000 spans in a week.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hv_batch.job.event_log.journal import Pace

PAUSE_S = 10.0  # a shorter one does not show on a timeline
FIRST_S = 30.0  # between the spans of one worker, at least
SPANS = 1000.0  # of all workers, in each doubling of the time, about


@dataclass(slots=True)
class WorkSpan:
    """Tasks of one worker that ended between `since` and `until`. Times are those of the caller's clock."""

    since: float
    until: float
    samples: int = 0
    failed: int = 0  # of these, whose task failed
    seconds: float = 0.0  # in tasks

    def add(self, begun: float, ended: float, samples: int, *, failed: bool) -> None:
        self.until = ended
        self.samples += samples
        self.failed += samples if failed else 0
        self.seconds += ended - begun


class WorkSpans:
    """Workers are given by their names. Methods return the spans that have ended, which the caller records."""

    def __init__(self, now: float) -> None:
        self._begun = now
        self._spans: dict[str, WorkSpan] = {}
        self._paces: dict[str, Pace] = {}

    def task_ended(self, worker: str, begun: float, ended: float, samples: int, *, failed: bool) -> WorkSpan | None:
        """Add a task. Returns the span before it, if a pause of `PAUSE_S` or longer has ended that one."""
        if worker not in self._paces:
            self._pace(worker).note(begun)
        span = self._spans.get(worker)
        before = None
        if span is not None and begun - span.until >= PAUSE_S and self._pace(worker).is_due(ended):
            before = self.take(worker, ended)
        span = self._spans.setdefault(worker, WorkSpan(begun, begun))
        span.add(begun, ended, samples, failed=failed)
        return before

    def take(self, worker: str, now: float) -> WorkSpan | None:
        """The span of a worker, which ends with it."""
        span = self._spans.pop(worker, None)
        if span is not None:
            self._pace(worker).note(now)
        return span

    def forget(self, worker: str) -> None:
        """The worker is gone; its last span was taken."""
        self._paces.pop(worker, None)

    def take_due(self, now: float, workers: int) -> Iterator[tuple[str, WorkSpan]]:
        """The spans that are long enough; `workers` is the number of all workers."""
        for worker in list(self._spans):
            pace = self._pace(worker)
            pace.divisor = max(1.0, min(64.0, SPANS / max(1, workers)))
            if pace.is_due(now) and (span := self.take(worker, now)) is not None:
                yield worker, span

    def _pace(self, worker: str) -> Pace:
        return self._paces.setdefault(worker, Pace(self._begun, FIRST_S))
