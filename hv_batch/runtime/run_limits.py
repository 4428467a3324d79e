"""Limits of one command: a time at which all work must have ended, and GPU hours. A run that meets one drains."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from threading import Event, Timer

from hv_batch.protocol import UserError

logger = logging.getLogger(__name__)

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class RunLimits:
    """`until` is when all work must have ended; `gpu_hours` bounds the GPU hours that the command reserves."""

    until: datetime | None = None
    gpu_hours: float = math.inf

    def __post_init__(self) -> None:
        if not self.gpu_hours > 0:
            raise UserError(f"--max-gpu-hours {self.gpu_hours:g} is not above 0.")


def run_limits(until: str | None, gpu_hours: float | None) -> RunLimits:
    """The limits of a command line. Raises UserError if a value is not allowed."""
    return RunLimits(
        None if until is None else next_time(until, datetime.now()), math.inf if gpu_hours is None else gpu_hours
    )


def check_gpu_hours(limits: RunLimits, gpus: float, drain_s: float) -> None:
    """Raises UserError if the drain of one group with `gpus` GPUs may reserve all GPU hours of the limit."""
    drain_hours = gpus * drain_s / HOUR_S
    if drain_hours >= limits.gpu_hours:
        raise UserError(
            f"--max-gpu-hours {limits.gpu_hours:g} is too small: to finish what is running may take timeouts.drain_s "
            f"= {drain_s:g} s of a group's {gpus:g} GPUs, which are {drain_hours:.2f} GPU hours. Give more, or lower "
            "timeouts.drain_s."
        )


class GpuMeter:
    """Adds up the GPU hours of a command. `is_spent` leaves enough for a drain of `drain_s` seconds."""

    def __init__(self, limit: float, drain_s: float) -> None:
        self.hours = 0.0
        self._limit = limit
        self._drain_hours = drain_s / HOUR_S
        self._gpus = 0.0  # reserved since `_since`
        self._since = 0.0

    def note(self, gpus: float, now: float) -> None:
        """`gpus` are reserved at the monotonic time `now`. To be called about once a second."""
        self.hours += self._gpus * (now - self._since) / HOUR_S
        self._gpus, self._since = gpus, now

    @property
    def is_spent(self) -> bool:
        return self.hours + self._gpus * self._drain_hours >= self._limit


def next_time(text: str, now: datetime) -> datetime:
    """The next time at which a clock of this machine shows `text` (HH:MM), also across a change to or from summer time.

    `now` is the local time, without a time zone. Raises UserError if `text` is not a time.
    """
    try:
        clock = datetime.strptime(text, "%H:%M").time()
    except ValueError:
        raise UserError(f"--until {text!r} is not a time of day; use HH:MM, for example 06:30.") from None
    today = now.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
    return (today if today > now else today + timedelta(days=1)).astimezone()


@contextmanager
def stop_in_time(until: datetime | None, drain_s: float, stopped: Event) -> Iterator[None]:
    """Set `stopped` `drain_s` seconds before `until`, so that the drain ends by then."""
    if until is None:
        yield
        return

    def stop() -> None:
        if not stopped.is_set():
            logger.info(f"the time limit {until:%H:%M} is near: no new samples are started")
            stopped.set()

    timer = Timer(max(0.0, (until - datetime.now(until.tzinfo)).total_seconds() - drain_s), stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
