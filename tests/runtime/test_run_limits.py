"""The limits of a command: a time of day, and GPU hours."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime, timedelta
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.protocol import UserError
from hv_batch.runtime.run_limits import GpuMeter, RunLimits, check_gpu_hours, next_time, run_limits, stop_in_time

NOON = datetime(2026, 11, 20, 12, 0)


@given(st.integers(0, 23), st.integers(0, 59), st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1)))
def test_a_deadline_is_the_next_such_time(hour, minute, now):
    """`--until 06:30` at 23:00 means the next morning: always in the future, at most a day ahead."""
    until = next_time(f"{hour:02d}:{minute:02d}", now)
    assert timedelta(0) < until - now.astimezone() <= timedelta(days=1)
    assert (until.hour, until.minute) == (hour, minute)


@pytest.mark.parametrize(("day", "hours"), [("2026-10-24", 8.5), ("2026-03-28", 6.5), ("2026-11-20", 7.5)])
def test_a_deadline_is_what_the_clock_on_the_wall_shows(monkeypatch, day, hours):
    """`--until 06:30` at 23:00, in the nights when the clocks of Berlin are set back, forward, or not at all."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        evening = datetime.fromisoformat(f"{day} 23:00")
        until = next_time("06:30", evening)
        assert (until.hour, until.minute) == (6, 30)
        assert until - evening.astimezone() == timedelta(hours=hours)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["25:00", "6.30", "", "06:30:00"])
def test_a_time_that_is_none_is_refused(text):
    """P6: the message names the expected format."""
    with pytest.raises(UserError, match=r"for example 06:30"):
        next_time(text, NOON)


def test_the_drain_begins_so_early_that_it_ends_in_time():
    """`--until`: the drain is requested drain_s before the deadline, or at once if that time has passed."""
    soon = datetime.now(UTC) + timedelta(seconds=100)
    for drain_s, begins in ((99.9, True), (200.0, True), (1.0, False)):
        stopped = Event()
        with stop_in_time(soon, drain_s, stopped):
            assert stopped.wait(10.0 if begins else 0.0) is begins
    with stop_in_time(None, 0.0, stopped := Event()):
        assert not stopped.is_set()


def test_gpu_hours_are_those_of_the_reserved_gpus():
    """The sum over the intervals between two notes, each with the GPUs that were reserved at its begin."""
    meter = GpuMeter(math.inf, 0.0)
    for gpus, at in ((0.0, 1000.0), (8.0, 1900.0), (16.0, 3700.0), (0.0, 7300.0), (0.0, 9000.0)):
        meter.note(gpus, at)
    assert meter.hours == pytest.approx(8 * 0.5 + 16 * 1.0)
    assert not meter.is_spent


@given(st.floats(0.1, 100), st.floats(0, 1000), st.integers(1, 64))
def test_a_drain_ends_within_the_limit(limit, drain_s, gpus):
    """`--max-gpu-hours`: a run that drains once `is_spent` has reserved at most the limit, up to one note."""
    meter, now = GpuMeter(limit, drain_s), 0.0
    meter.note(gpus, now)
    if meter.is_spent:
        with pytest.raises(UserError, match="too small"):
            check_gpu_hours(RunLimits(gpu_hours=limit), gpus, drain_s)
        return
    step_s = 1.0 + limit * 3600 / gpus / 100
    while not meter.is_spent:
        now += step_s
        meter.note(gpus, now)
    assert meter.hours + gpus * (drain_s - step_s) / 3600 <= limit * (1 + 1e-9)


@pytest.mark.parametrize("hours", [0.0, -1.0, math.nan])
def test_gpu_hours_that_are_none_are_refused(hours):
    """P6: the message names the flag and what is allowed."""
    with pytest.raises(UserError, match=r"--max-gpu-hours .* is not above 0"):
        run_limits(None, hours)
