"""What the last driver of an output root does or did, from its events: its workers, its rate, and the last events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from hv_batch.job.event_log.reader import Event, read_events
from hv_batch.job.formatting import clock, plural
from hv_batch.job.records.lease_holder import LeaseHolder, is_gone
from hv_batch.job.redaction import printable_text
from hv_batch.job.storage.store import Store

RATE_S = 3600.0  # the time over which the rate is measured
MAX_RECENT = 8
MAX_CHARS = 200  # of a line

_STATES = {"worker_asked": "waiting", "worker_placed": "loading", "worker_ready": "ready"}
_PHASES = {
    "outage": "the output root has not answered since",
    "lost": "killed after its last event at",
    **{outcome: f"{outcome} at" for outcome in ("finished", "stopped", "failed")},
}
_GONE = frozenset({"worker_lost", "worker_released"})
_POOLS = {"encode": "encoder", "denoise": "group", "decode": "decoder"}
# Events of which nobody needs to hear one by one, because the counts contain them.
_ROUTINE = frozenset({"progress", "worker_work", "worker_asked", "worker_placed"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """The last driver of a root. Times are unix seconds.

    `phase` is `starting` (no group is ready), `rendering`, `draining`, `outage` (the output root does not answer), the
    outcome of a driver that has ended (`finished`, `stopped`, `failed`), or `lost` if it has ended without an event.
    """

    driver: str
    host: str
    phase: str
    since: float
    started_at: float
    last_event_at: float
    message: str = ""  # of a failed run
    workers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by stage: waiting, loading, ready
    lost: Mapping[str, int] = field(default_factory=dict)  # workers by failure class
    samples_per_hour: float | None = None  # over the last RATE_S; None if no sample was done
    eta_s: float | None = None  # None also if the driver has ended
    recent: tuple[Mapping[str, Any], ...] = ()  # the last events: at, kind, text

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> list[str]:
        """The lines of `status`."""
        failed = f": {_one_line(self.message)}" if self.message else ""
        host, when = f" on {_one_line(self.host)}" if self.host else "", _time(self.since)
        lines = [f"driver {self.driver}{host}: {_PHASES.get(self.phase, f'{self.phase} since')} {when}{failed}"]
        if workers := ", ".join(self._workers()):
            lines.append(f"workers: {workers}")
        if self.samples_per_hour is not None:
            eta = "" if self.eta_s is None else f", ETA {clock(self.eta_s)}"
            rate = f"{self.samples_per_hour:,.0f}" if self.samples_per_hour >= 100 else f"{self.samples_per_hour:.3g}"
            lines.append(f"{rate} samples/h over the last hour of its log{eta}")
        if self.lost:
            lines.append("workers lost: " + ", ".join(f"{count:,} x {kind}" for kind, count in self.lost.items()))
        return [*lines, "last events:", *(f"  {_time(event['at'])}  {event['text']}" for event in self.recent)]

    def _workers(self) -> Iterator[str]:
        for stage, counts in self.workers.items():
            states = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
            yield f"{_POOLS[stage]}s ({states})"


def read_activity(store: Store, holder: LeaseHolder | None) -> Activity | None:
    """The activity of the last driver; None if no driver has written events. `holder` is that of the root's lease."""
    drivers = [each for each in read_events(store, newest=2) if each.events]
    if not drivers:
        return None
    is_alive = holder is not None and is_gone(holder) is not True
    return describe_driver(drivers[-1].driver, drivers[-1].events, is_alive=is_alive)


def describe_driver(driver: str, events: Sequence[Event], *, is_alive: bool) -> Activity:
    """The activity that follows from the events of one driver, of which there is at least one."""
    started, last = events[0], events[-1]
    workers: dict[str, tuple[str, str]] = {}  # stage and state of each worker that exists
    ready_groups: set[str] = set()
    lost: Counter[str] = Counter()
    phase, since, ended = "starting", started["at"], None
    is_away = is_draining = is_rendering = False
    for event in events:
        kind, worker, stage = event["kind"], event.get("worker", ""), event.get("stage")
        if kind in _STATES and stage:
            workers[worker] = (stage, _STATES[kind])
        elif kind in _GONE:
            workers.pop(worker, None)
            lost.update([str(event.get("class", "unknown"))] if kind == "worker_lost" else [])
        elif kind in ("outage_started", "outage_ended"):
            is_away = kind == "outage_started"
        elif kind == "drain_started":
            is_draining = True
        elif kind == "run_ended":
            ended = event
        if stage == "denoise":
            ready_groups.discard(worker)
            ready_groups.update([worker] if kind in ("worker_ready", "worker_work") else [])
            # A run whose last group was released because no sample needs it still decodes.
            is_rendering = bool(ready_groups) or (is_rendering and kind == "worker_released")
        current = "outage" if is_away else "draining" if is_draining else "rendering" if is_rendering else "starting"
        if current != phase:
            phase, since = current, event["at"]
    if ended is not None:
        phase, since = str(ended.get("outcome", "finished")), ended["at"]
    elif not is_alive:
        phase, since = "lost", last["at"]
    per_hour, pending = _rate(events)
    is_running = ended is None and is_alive
    return Activity(
        driver=driver,
        host=started.get("host", ""),
        phase=phase,
        since=since,
        started_at=started["at"],
        last_event_at=last["at"],
        message=ended.get("message", "") if ended else "",
        workers=_count_workers(workers.values()) if is_running else {},
        lost=dict(lost),
        samples_per_hour=per_hour,
        eta_s=3600 * pending / per_hour if per_hour and is_running else None,
        recent=tuple(_recent(events)),
    )


def _count_workers(workers: Any) -> dict[str, dict[str, int]]:
    found = Counter(workers)
    stages = [stage for stage in _POOLS if any(each == stage for each, _ in found)]
    return {stage: {state: found[stage, state] for state in ("ready", "loading", "waiting")} for stage in stages}


def _rate(events: Sequence[Event]) -> tuple[float | None, int]:
    """Samples per hour over the last RATE_S of the log, and the pending samples at its end.

    The time before the first sample is left out: workers load their weights then.
    """
    points = [(event["at"], _done(event), event.get("pending", 0)) for event in events if event["kind"] == "progress"]
    if not points:
        return None, 0
    at, done, pending = points[-1]
    before = [point for point in points if point[1] == points[0][1]][-1:]  # the last one without a new sample
    before += [point for point in points if before and before[0][0] < point[0] <= at - RATE_S][-1:]
    since, done_then, _ = before[-1] if before else points[0]
    if done <= done_then or at <= since:
        return None, pending
    return 3600 * (done - done_then) / (at - since), pending


def _done(event: Event) -> int:
    return int(event.get("committed", 0) + event.get("quarantined", 0))


def _recent(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    shown = [event for event in events if event["kind"] not in _ROUTINE][-MAX_RECENT:]
    for event in shown:
        yield {"at": event["at"], "kind": event["kind"], "text": describe_event(event)}


def describe_event(event: Event) -> str:
    """One line about an event, without its time."""
    subject = event.get("worker") or (f"node {event['node']}" if event.get("node") else "")
    what = event["kind"].partition("_")[2] if subject else event["kind"].replace("_", " ")
    where = f" on {', '.join(event['nodes'])}" if event.get("nodes") else ""
    if event["kind"] == "run_ended":
        what = f"run {event.get('outcome', 'ended')}"
    if event["kind"] == "run_started":
        what = f"run started with {plural(event.get('pending', 0), 'pending sample')}"
    if event["kind"] == "outage_ended":
        what = f"outage ended after {clock(event.get('seconds', 0.0))}"
    message = ": ".join(filter(None, (event.get("class"), event.get("message"))))
    return _one_line(f"{f'{subject} ' if subject else ''}{what}{where}{f': {message}' if message else ''}")


def _one_line(text: str) -> str:
    return " ".join(printable_text(text).split())[:MAX_CHARS]


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
