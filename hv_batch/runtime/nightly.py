"""The unattended night: the partition of a date, after what earlier nights have left, until a deadline.

Every night has an output root of its own, named after its date. Whatever happens to one night, the others are still
tried (P5), and the last word is one line of JSON for a pager to read.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from threading import Event, Timer
from typing import Any, TextIO

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.records.run_document import read_run_config
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.render import ExitCode, render

logger = logging.getLogger(__name__)

PLACE = "{date}"  # in a manifest's URL; becomes 2026-11-20

# From best to worst: a night that failed wakes somebody, one that was stopped goes on tomorrow.
OUTCOMES = {
    ExitCode.COMMITTED: "committed",
    ExitCode.QUARANTINED: "quarantined",
    ExitCode.STOPPED: "stopped",
    ExitCode.FATAL: "failed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """What became of one date's partition."""

    date: str
    output: str
    outcome: str  # of OUTCOMES
    seconds: float
    committed: int | None = None  # None where no summary was written
    quarantined: int | None = None
    pending: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NightlyRequest:
    """What to render tonight. `manifest` holds PLACE; `output` is the folder that the nights' roots are in."""

    config: RunConfig
    manifest: str
    output: str
    day: date
    until: datetime | None  # a time by which all work must have ended
    catch_up: int  # days before `day` whose unfinished runs are resumed first

    def __post_init__(self) -> None:
        if PLACE not in self.manifest:
            raise UserError(
                f"The manifest {self.manifest} is the same on every date: put {PLACE} where the date belongs, as in "
                f"s3://bucket/prompts/date={PLACE}/prompts.parquet."
            )

    def root(self, day: date) -> str:
        return f"{self.output.rstrip('/')}/{day.isoformat()}"


def render_night(orders: NightlyRequest, *, address: str | None, report: TextIO) -> ExitCode:
    """Catch up, render the date, and write the line to `report`. The exit code is that of the worst night."""
    begun, stopped = time.monotonic(), Event()

    def attempt(day: date) -> Night:
        def work() -> ExitCode:
            tonight = orders.config, orders.manifest.replace(PLACE, day.isoformat())
            config, manifest = tonight if day == orders.day else read_run_config(orders.root(day))
            with stop_in_time(orders.until, config.timeouts.drain_s, stopped):
                return render(config, manifest, orders.root(day), address=address, stopped=stopped)

        logger.info(f"night of {day}: {orders.root(day)}")
        return _judge(day, orders.root(day), work, stopped)

    nights = [attempt(day) for day in (*_earlier(orders), orders.day)]
    worst = max((code for night in nights for code, name in OUTCOMES.items() if name == night.outcome), key=_badness)
    line = {
        "schema": "hv_batch/night/1",
        "date": orders.day.isoformat(),
        "outcome": OUTCOMES[worst],
        "exit_code": int(worst),
        "seconds": round(time.monotonic() - begun, 1),
        "nights": [asdict(night) for night in nights],
    }
    print(json.dumps(line, ensure_ascii=False), file=report, flush=True)
    return worst


def unfinished(orders: NightlyRequest) -> Iterator[date]:
    """The days before, oldest first, whose run was begun and has not ended. A day without a run is nobody's order."""
    for back in range(orders.catch_up, 0, -1):
        day = orders.day - timedelta(days=back)
        store = Store(orders.root(day))
        if store.exists(layout.RUN) and not store.exists(layout.SUCCESS):
            yield day


def _earlier(orders: NightlyRequest) -> list[date]:
    try:
        return list(unfinished(orders))
    except (OSError, UserError) as problem:  # tonight's own attempt will say it in the report
        logger.warning(f"cannot look for unfinished nights: {problem}")
        return []


def which_day(text: str | None, now: datetime) -> date:
    """The date of `text` (YYYY-MM-DD), or the day before `now`. Raises UserError for anything else."""
    try:
        return date.fromisoformat(text) if text else now.date() - timedelta(days=1)
    except ValueError:
        raise UserError(f"--date {text!r} is not a date; give year, month and day, as 2026-11-20.") from None


def next_time(text: str, now: datetime) -> datetime:
    """The next moment at which a clock of this machine shows `text` (HH:MM), in a night of a time change, too.

    `now` is its local time, without a zone. Raises UserError for anything else than a time.
    """
    try:
        clock = datetime.strptime(text, "%H:%M").time()
    except ValueError:
        raise UserError(f"--until {text!r} is not a time of day; give hours and minutes, as 06:30.") from None
    today = now.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
    return (today if today > now else today + timedelta(days=1)).astimezone()


def _judge(day: date, output: str, work: Callable[[], ExitCode], stopped: Event) -> Night:
    """Do a night's `work`, unless the time is up, and say what became of it."""
    begun = time.monotonic()
    error = None
    try:
        code = ExitCode.STOPPED if stopped.is_set() else work()
    except UserError as problem:
        code, error = ExitCode.FATAL, str(problem)
        logger.error(f"night of {day}: {error}")
    except Exception as fault:
        code, error = ExitCode.FATAL, f"{type(fault).__name__}: {fault}"
        logger.exception(f"night of {day} failed")
    return Night(
        date=day.isoformat(),
        output=output,
        outcome=OUTCOMES[code],
        seconds=round(time.monotonic() - begun, 1),
        error=error,
        **_counts(Store(output)),
    )


def _counts(store: Store) -> dict[str, Any]:
    try:
        summary = json.loads(store.get(layout.SUMMARY))
        return {name: summary[name] for name in ("committed", "quarantined", "pending")}
    except (OSError, UserError):  # none was written; or the store is what failed, and that is told already
        return {}
    except (ValueError, KeyError, TypeError):  # damaged; the pager's line must not be lost with it
        return {}


@contextmanager
def stop_in_time(until: datetime | None, drain_s: float, stopped: Event) -> Iterator[None]:
    """Ask for a drain so early that it has ended by `until`."""
    if until is None:
        yield
        return
    timer = Timer(max(0.0, (until - datetime.now(until.tzinfo)).total_seconds() - drain_s), stopped.set)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _badness(code: ExitCode) -> int:
    return list(OUTCOMES).index(code)
