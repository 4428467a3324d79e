"""A wall clock that jumps, for one Python process: `time.time` and `datetime.now` are shifted by the seconds in a file.

Clocks that do not jump on a real machine stay as they are. libfaketime is not used: its clock_nanosleep fails in
Python 3.11 if the monotonic clock is left alone. `datetime.datetime` is replaced only where modules read the clock with
it, because compiled packages crash if it is another class.
"""

from __future__ import annotations

import datetime
import os
import sys
import time

CLOCK = "HV_BATCH_CHAOS_CLOCK"  # names the file; without it nothing is shifted
READERS = ("hv_batch.", "botocore.")

_time, _datetime = time.time, datetime.datetime


def shift_clock() -> None:
    """Shift the clock of this process for the modules that are loaded."""
    if CLOCK not in os.environ:
        return
    time.time = _now
    for name, module in list(sys.modules.items()):
        if not name.startswith(READERS):
            continue
        if getattr(module, "datetime", None) is _datetime:
            module.datetime = ShiftedDatetime
        if hasattr(module, "get_current_datetime"):
            module.get_current_datetime = _current_datetime


def _now() -> float:
    with open(os.environ[CLOCK]) as file:
        return _time() + float(file.read() or 0.0)


def _current_datetime(remove_tzinfo: bool = True) -> datetime.datetime:
    """In place of botocore's function, whose result is in the signature of a request."""
    now = ShiftedDatetime.now(datetime.UTC)
    return now.replace(tzinfo=None) if remove_tzinfo else now


class ShiftedDatetime(_datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]  # a plain datetime
        return _datetime.fromtimestamp(_now(), tz)
