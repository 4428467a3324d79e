"""The nightly job: which dates are rendered."""

from __future__ import annotations

from datetime import date, datetime

import pytest

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.nightly import NightlyRequest, unfinished, which_day

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
