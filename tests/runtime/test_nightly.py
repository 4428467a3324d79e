"""The nightly job: which dates are rendered, and until when."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime, timedelta
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.nightly import NightlyRequest, next_time, stop_in_time, unfinished, which_day

NOON = datetime(2026, 11, 20, 12, 0)


def request_for(output, **changes) -> NightlyRequest:
    values = {"manifest": "p/{date}.jsonl", "day": date(2026, 11, 19), "until": None, "catch_up": 3} | changes
    return NightlyRequest(config=RunConfig(), output=str(output), **values)


def test_yesterday_is_the_default():
    """A nightly job that starts after midnight renders the day that has just ended."""
    assert which_day(None, NOON) == date(2026, 11, 19)
    assert which_day("2026-01-02", NOON) == date(2026, 1, 2)


@pytest.mark.parametrize("text", ["20.11.2026", "2026-13-01", "yesterday"])
def test_a_date_that_is_none_is_refused(text):
    """P6: the message names the expected format."""
    with pytest.raises(UserError, match="for example 2026-11-20"):
        which_day(text, NOON)


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


def test_a_manifest_without_a_place_for_the_date_is_refused(tmp_path):
    """P6: without {date}, every night would render the same prompts."""
    with pytest.raises(UserError, match=r"\{date\}"):
        request_for(tmp_path, manifest="prompts.jsonl")


def test_unfinished_nights_come_oldest_first(tmp_path):
    """A run that was started and has no _SUCCESS is unfinished; days without a run are skipped."""
    for day, finished in ((15, False), (16, False), (17, True), (18, False), (19, False)):
        store = Store(f"{tmp_path}/2026-11-{day}")
        store.put(layout.RUN, b"{}")
        if finished:
            store.put(layout.SUCCESS, b"")
    assert list(unfinished(request_for(tmp_path))) == [date(2026, 11, 16), date(2026, 11, 18)]
    assert list(unfinished(request_for(tmp_path, catch_up=0))) == []


def test_the_drain_begins_so_early_that_it_ends_in_time():
    """`--until`: the drain is requested drain_s before the deadline, or at once if that time has passed."""
    soon = datetime.now(UTC) + timedelta(seconds=100)
    for drain_s, begins in ((99.9, True), (200.0, True), (1.0, False)):
        stopped = Event()
        with stop_in_time(soon, drain_s, stopped):
            assert stopped.wait(10.0 if begins else 0.0) is begins
    with stop_in_time(None, 0.0, stopped := Event()):
        assert not stopped.is_set()
