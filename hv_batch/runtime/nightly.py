"""The nightly job: resumes unfinished runs of earlier dates, then renders the partition of a date, until a deadline.

Each date has an output root of its own, named after it. A failure of one night does not prevent the others (P5). At the
end the job prints one line of JSON for monitoring.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from typing import Any, TextIO

from hv_batch.job import layout
from hv_batch.job.config.hook_rules import hook_texts
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.records.lease import LeaseHeldError
from hv_batch.job.records.run_document import read_run_config, read_summary
from hv_batch.job.redaction import safe_text
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.render import render
from hv_batch.runtime.run_end import OUTCOMES, ExitCode
from hv_batch.runtime.run_limits import stop_in_time
from hv_batch.runtime.stop_signals import StopSignals

logger = logging.getLogger(__name__)

PLACE = "{date}"  # in a manifest's URL; replaced by a date such as 2026-11-20


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """The result of one date's partition."""

    date: str
    output: str
    outcome: str  # one of OUTCOMES
    seconds: float
    committed: int | None = None  # None if there is no summary
    quarantined: int | None = None
    pending: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NightlyRequest:
    """What to render. `manifest` contains PLACE; `output` is the folder of the nights' output roots."""

    config: RunConfig
    manifest: str
    output: str
    day: date
    until: datetime | None  # the time at which all work must have ended
    catch_up: int  # number of days before `day` whose unfinished runs are resumed first
    allow_change: Collection[str] = ()  # as of `render`, for the root of `day`; earlier runs keep their config

    def __post_init__(self) -> None:
        if not self.output.strip():
            raise UserError("--output is blank. Give the folder of the nights' output roots, or its URL.")
        if PLACE not in self.manifest:
            raise UserError(
                f"The manifest {self.manifest} is the same on every date: insert {PLACE} in place of the date, as in "
                f"s3://bucket/prompts/date={PLACE}/prompts.parquet."
            )

    def root(self, day: date) -> str:
        return f"{self.output.rstrip('/')}/{day.isoformat()}"


def render_night(
    request: NightlyRequest,
    *,
    address: str | None,
    report: TextIO,
    on_line: Callable[[dict[str, Any]], None] | None = None,
) -> ExitCode:
    """Resume unfinished runs, render the date, write the line of JSON to `report`, and pass it to `on_line`, if any.

    Returns the exit code of the worst night.
    """
    begun, stop = time.monotonic(), StopSignals()
    with stop.handled():
        # Until the line is printed, a stop in this block only sets the event.
        nights = [_render_day(request, day, address, stop) for day in (*_earlier(request, stop), request.day)]
        ends = {night.outcome for night in nights}
        worst = max((code for code, name in OUTCOMES.items() if name in ends), key=_badness)
        line = {
            "schema": "hv_batch/night/1",
            "date": request.day.isoformat(),
            "outcome": OUTCOMES[worst],
            "exit_code": int(worst),
            "seconds": round(time.monotonic() - begun, 1),
            "nights": [asdict(night) for night in nights],
        }
        try:
            print(safe_text(json.dumps(line, ensure_ascii=False)), file=report, flush=True)
        except OSError as error:  # the reader of the pipe is gone; the exit code still gives the outcome
            logger.error(f"the line of JSON cannot be written to stdout: {error}")
        if on_line:
            on_line(line)
    return worst


def _render_day(request: NightlyRequest, day: date, address: str | None, stop: StopSignals) -> Night:
    def work() -> ExitCode:
        with stop.interruptible():
            own = request.config, request.manifest.replace(PLACE, day.isoformat())
            config, manifest = own if day == request.day else _recorded(request, day)
        with stop_in_time(request.until, config.timeouts.drain_s, stop.stopped):
            return render(
                config,
                manifest,
                request.root(day),
                address=address,
                stopped=stop.stopped,
                resumed=day != request.day,
                allow_change=request.allow_change if day == request.day else (),
            )

    logger.info(f"night of {day}: {request.root(day)}")
    return _run_night(day, request.root(day), work, stop)


def _recorded(request: NightlyRequest, day: date) -> tuple[RunConfig, str | list[str]]:
    """The config and manifest of an earlier night. The operator names the engine and the hooks of tonight's config."""
    tonight = request.config
    return read_run_config(request.root(day), [tonight.model.engine], list(hook_texts(tonight.hooks).values()))


def unfinished(request: NightlyRequest) -> Iterator[date]:
    """The earlier days, oldest first, whose run was started and is not finished. Days without a run are skipped."""
    for back in range(request.catch_up, 0, -1):
        day = request.day - timedelta(days=back)
        store = Store(request.root(day))
        if store.exists(layout.RUN) and not store.exists(layout.SUCCESS):
            yield day


def _earlier(request: NightlyRequest, stop: StopSignals) -> list[date]:
    try:
        with stop.interruptible():
            return list(unfinished(request))
    except KeyboardInterrupt:  # the night of `request.day` is then reported as stopped
        return []
    except (OSError, UserError) as problem:  # the run of `request.day` fails for the same reason, and is reported
        logger.warning(f"cannot look for unfinished nights: {problem}")
        return []


def which_day(text: str | None, now: datetime) -> date:
    """The date of `text` (YYYY-MM-DD), or the day before `now`. Raises UserError for anything else."""
    try:
        return date.fromisoformat(text) if text else now.date() - timedelta(days=1)
    except ValueError:
        raise UserError(f"--date {text!r} is not a date; use YYYY-MM-DD, for example 2026-11-20.") from None


def _run_night(day: date, output: str, work: Callable[[], ExitCode], stop: StopSignals) -> Night:
    """Call `work`, unless the deadline has passed, and return the result of the night."""
    begun = time.monotonic()
    error = None
    try:
        code = ExitCode.STOPPED if stop.stopped.is_set() else work()
    except KeyboardInterrupt:
        code = ExitCode.STOPPED
    except LeaseHeldError as problem:
        code, error = ExitCode.HELD, str(problem)
        logger.error(f"night of {day}: {error}")
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
        error=error and safe_text(error),
        **_counts(output, stop),
    )


def _counts(output: str, stop: StopSignals) -> dict[str, Any]:
    try:
        with stop.interruptible():
            summary = read_summary(Store(output))  # None if there is none, or if it is damaged
    except (KeyboardInterrupt, OSError, UserError):  # the store fails, or there is no run: the error already says so
        return {}
    return {name: summary[name] for name in ("committed", "quarantined", "pending")} if summary else {}


def _badness(code: ExitCode) -> int:
    return list(OUTCOMES).index(code)
