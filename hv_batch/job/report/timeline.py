"""The timeline of a run: for each worker slot, when it loaded, worked, was idle, drained or was lost.

A row is a slot ("denoise-0"), because a worker that was rebuilt follows its predecessor there. Rows come from the
events of the drivers (`documents.events`), and for the time before the first event from the commit records (`spans`),
which know work only.

GPU-seconds: what records count by stage, and from the events what was lost to a cause:

    start_up     workers that load
    idle         ready workers without a task
    drain        the same while the run drains
    preemption, failure    the time from the last finished task of a lost worker to its loss
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import itemgetter
from typing import Any

from hv_batch.job.event_log.reader import DriverEvents, Event
from hv_batch.job.report.pace import PAUSE_S, TimeBins, join
from hv_batch.job.report.samples import clamp
from hv_batch.job.report.spans import WorkSpan

MAX_ROWS = 200
MAX_SPANS = 6000  # of all rows
MAX_DRAINS = 20  # of a driver, which drains once. Each cuts the idle time of every worker.
STAGE_ORDER = ("denoise", "decode", "encode")

START, WORK, IDLE, DRAIN, LOST = "start", "work", "idle", "drain", "lost"
PREEMPTED = "PREEMPTED"

Range = tuple[float, float]


@dataclass(slots=True)
class Span:
    start: float
    end: float
    kind: str
    samples: int = 0
    cause: str = ""  # of LOST: the failure class


@dataclass(slots=True)
class Row:
    worker: str
    stage: str
    node: str = ""
    gpus: float = 0.0
    spans: list[Span] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        spans = [[round(span.start, 1), round(span.end, 1), span.kind, span.samples] for span in self.spans]
        return {"worker": self.worker, "stage": self.stage, "node": self.node, "gpus": self.gpus, "spans": spans}


@dataclass(frozen=True, slots=True)
class Timeline:
    rows: tuple[Row, ...]  # at most MAX_ROWS, with at most MAX_SPANS spans in all
    rows_left_out: int
    lost: Mapping[str, float]  # GPU-seconds by cause
    work: tuple[Range, ...]  # the times in which the run was at work

    @property
    def begin(self) -> float | None:
        return min((begin for begin, _ in self.work), default=None)

    @property
    def wall_seconds(self) -> float:
        return sum(end - begin for begin, end in self.work)

    def gpu_seconds(self, used: Mapping[str, float]) -> dict[str, float]:
        """`used` GPU-seconds by stage, and those lost by cause."""
        return {name: round(seconds, 1) for name, seconds in {**used, **self.lost}.items() if seconds}

    def to_dict(self) -> dict[str, Any]:
        begin, end = self.begin, max((end for _, end in self.work), default=None)
        rows = [row.to_dict() for row in self.rows]
        return {"from": begin, "to": end, "rows": rows, "rows_left_out": self.rows_left_out}


def make_timeline(
    drivers: Sequence[DriverEvents], recorded: Iterable[WorkSpan], finished: TimeBins, *, now: float | None
) -> Timeline:
    """`recorded` are the spans of the records, `finished` the times of the records; `now` is None if no driver runs."""
    rows: dict[str, Row] = {}
    ranges: list[Range] = []
    for number, driver in enumerate(drivers):
        if not driver.events:
            continue
        # A driver writes them in this order, but anybody may have written others.
        driver = replace(driver, events=tuple(sorted(driver.events, key=itemgetter("at"))))
        begin, end = _driver_range(driver, now if number == len(drivers) - 1 else None)
        ranges.append((begin, end))
        _add_driver(rows, driver, end)
    first_event = min((begin for begin, _ in ranges), default=float("inf"))
    before = [span for span in recorded if span.end <= first_event]
    for span in before:
        row = _row(rows, span.worker, span.stage)
        row.node, row.gpus = row.node or span.node, row.gpus or span.gpus
        row.spans.append(Span(span.start, span.end, WORK, span.samples))
    at_work = [(span.start, span.end) for span in before]
    at_work += [(at, min(at + finished.width, first_event)) for at in finished.starts() if at < first_event]
    for row in rows.values():
        row.spans.sort(key=lambda span: (span.start, span.end))
    shown = sorted(rows.values(), key=_place)[:MAX_ROWS]
    return Timeline(
        rows=tuple(coarsen(shown, MAX_SPANS)),
        rows_left_out=len(rows) - len(shown),
        lost=_lost_seconds(rows.values()),
        work=tuple(join([*ranges, *join(at_work, PAUSE_S)])),
    )


def _driver_range(driver: DriverEvents, now: float | None) -> Range:
    times = [event["at"] for event in driver.events]
    ended = driver.last("run_ended")
    begin = min(times)
    return begin, max(begin, ended["at"] if ended else max(*times, now or 0.0))


def _add_driver(rows: dict[str, Row], driver: DriverEvents, end: float) -> None:
    drains = list(islice(_drains(driver, end), MAX_DRAINS))
    by_worker: defaultdict[str, list[Event]] = defaultdict(list)
    for event in driver.events:
        if event.get("worker") and event.get("stage"):
            by_worker[event["worker"]].append(event)
    for worker, events in by_worker.items():
        row = _row(rows, worker, events[0]["stage"])
        for event in events:
            row.gpus = event.get("gpus") or row.gpus
            row.node = clamp(", ".join(event.get("nodes", ())), 200) or row.node
        row.spans += _split_idle(_of_worker(events, end), drains)


def _drains(driver: DriverEvents, end: float) -> Iterator[Range]:
    """The times in which the run drained."""
    begun: float | None = None
    for event in driver.events:
        if event["kind"] == "drain_started" and begun is None:
            begun = event["at"]
        elif event["kind"] == "drain_ended" and begun is not None:
            yield begun, event["at"]
            begun = None
    if begun is not None:
        yield begun, end


def _of_worker(events: Sequence[Event], end: float) -> Iterator[Span]:
    """The spans of one worker of one driver, whose events are in order. `end` is that of the driver."""
    asked = placed = ready = None  # unix times
    last = 0.0  # the end of the last span
    for event in events:
        at, kind = event["at"], event["kind"]
        if kind == "worker_asked":
            asked = at
        elif kind == "worker_placed":
            placed = at
        elif kind == "worker_ready":
            begun = placed if placed is not None else asked
            if begun is not None and begun < at:
                yield Span(begun, at, START)
            ready = last = at
        elif kind == "worker_work":
            begun = min(event.get("since") or at, at)
            if ready is not None and begun > last:
                yield Span(last, begun, IDLE)
            # A part of a driver that was lost may hold the event of its start.
            yield Span(max(begun, last), max(at, last), WORK, event.get("samples", 0))
            ready, last = ready or begun, max(at, last)
        elif kind in ("worker_lost", "worker_released"):
            yield from _last_span(event, placed, ready, last)
            return
    if ready is not None and end > last:
        yield Span(last, end, IDLE)
    elif ready is None and placed is not None and end > placed:
        yield Span(placed, end, START)


def _last_span(event: Event, placed: float | None, ready: float | None, last: float) -> Iterator[Span]:
    begun = last if ready is not None else placed
    if begun is None or event["at"] < begun:
        return
    if event["kind"] == "worker_lost":
        yield Span(begun, event["at"], LOST, cause=event.get("class", ""))
    elif event["at"] > begun:
        yield Span(begun, event["at"], IDLE if ready is not None else START)


def _split_idle(spans: Iterable[Span], drains: Sequence[Range]) -> Iterator[Span]:
    """The spans, with idle time during a drain as DRAIN."""
    for span in spans:
        if span.kind != IDLE:
            yield span
            continue
        at = span.start
        for begin, end in drains:
            if begin < span.end and end > at:
                if begin > at:
                    yield Span(at, begin, IDLE)
                yield Span(max(at, begin), min(end, span.end), DRAIN)
                at = min(end, span.end)
        if at < span.end:
            yield Span(at, span.end, IDLE)


def _row(rows: dict[str, Row], worker: str, stage: str) -> Row:
    """The row of the slot of a worker: "denoise-0.1" is the second worker of the slot "denoise-0"."""
    slot = worker.rpartition(".")[0] or worker
    return rows.setdefault(slot, Row(clamp(slot, 200), stage))


def _place(row: Row) -> tuple[int, str, int, str]:
    """The order of the rows: by stage, then by the number of the slot."""
    name, _, number = row.worker.rpartition("-")
    stage = STAGE_ORDER.index(row.stage) if row.stage in STAGE_ORDER else len(STAGE_ORDER)
    return stage, name, int(number) if number.isdecimal() and len(number) < 10 else -1, row.worker


def _lost_seconds(rows: Iterable[Row]) -> dict[str, float]:
    lost: defaultdict[str, float] = defaultdict(float)
    causes = {START: "start_up", IDLE: "idle", DRAIN: "drain"}
    for row in rows:
        for span in row.spans:
            cause = causes.get(span.kind) or ("preemption" if span.cause == PREEMPTED else "failure")
            if span.kind != WORK and row.gpus:
                lost[cause] += row.gpus * (span.end - span.start)
    return dict(lost)


def coarsen(rows: Sequence[Row], at_most: int) -> list[Row]:
    """The rows with at most `at_most` spans: work is joined over ever longer pauses, then the first spans are left out.

    Only spans that lie between two spans of work are absorbed, never a loss.
    """
    tolerance_s = 1.0
    merged = [_joined(row, tolerance_s) for row in rows]
    for _ in range(30):
        if sum(len(row.spans) for row in merged) <= at_most:
            return merged
        tolerance_s *= 2
        merged = [_joined(row, tolerance_s) for row in merged]
    share = max(1, at_most // max(1, len(merged)))
    return [Row(row.worker, row.stage, row.node, row.gpus, row.spans[-share:]) for row in merged]


def _joined(row: Row, tolerance_s: float) -> Row:
    spans: list[Span] = []
    for span in row.spans:
        if span.kind == WORK:
            at = len(spans) - 1
            while at >= 0 and spans[at].kind in (IDLE, DRAIN) and spans[at].start >= span.start - tolerance_s:
                at -= 1
            if at >= 0 and spans[at].kind == WORK and span.start - spans[at].end <= tolerance_s:
                last = spans[at]
                del spans[at:]
                span = Span(last.start, max(last.end, span.end), WORK, last.samples + span.samples)
        spans.append(span)
    return Row(row.worker, row.stage, row.node, row.gpus, spans)
