"""What a driver keeps of its events: bounded in size, number and text, and written in parts that never change."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.documents.events import MAX_LINE_BYTES, MAX_MESSAGE_CHARS
from hv_batch.job.event_log import journal
from hv_batch.job.event_log.journal import Journal, Pace
from hv_batch.job.event_log.reader import parse_part

DAY_S = 86_400

KINDS = st.sampled_from(["progress", "worker_work", "worker_ready", "worker_lost", "run_started", "outage_started"])
TEXTS = st.text(max_size=3000) | st.text(st.characters(categories=["Cs"]), max_size=3000)
EVENTS = st.fixed_dictionaries(
    {"kind": KINDS, "at": st.floats(0, 1e10)},
    optional={"message": TEXTS, "worker": TEXTS, "nodes": st.lists(TEXTS, max_size=40), "class": st.just("INFRA")},
)


def write_all(kept: Journal, now: float) -> list[bytes]:
    """The parts that are left."""
    parts = []
    while (part := kept.take_part(now, at_end=True)) is not None:
        parts.append(part)
        kept.part_written()
    return parts


def events_of(parts: list[bytes]) -> list[dict]:
    read = [parse_part(part) for part in parts]
    assert [problem for _, problem in read if problem] == []
    return [dict(event) for events, _ in read for event in events]


@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_is_written_as_valid_lines_in_order(events):
    """P5: no text of an error, however long or broken, makes a part that cannot be read."""
    kept = Journal(0.0)
    for event in events:
        kept.add(event)
    parts = write_all(kept, 0.0)
    assert [event["kind"] for event in events_of(parts)] == [event["kind"] for event in events]
    assert all(len(line) <= MAX_LINE_BYTES for part in parts for line in part.split(b"\n"))
    assert all(len(event.get("message", "")) <= MAX_MESSAGE_CHARS for event in events_of(parts))


def test_no_secret_is_written(monkeypatch):
    monkeypatch.setenv("MY_ACCESS_KEY", "do-not-write-this")
    kept = Journal(0.0)
    kept.add({"kind": "worker_lost", "at": 1.0, "message": "GET https://u:p@host/x?sig=1 with do-not-write-this"})
    (event,) = events_of(write_all(kept, 0.0))
    assert event["message"] == "GET https://host/x with ***"


@given(st.lists(st.sampled_from(["add", "take", "fail", "wait"]), max_size=60))
def test_a_part_that_was_offered_to_the_store_never_changes(steps):
    """P1: a write that failed may have arrived, so the next attempt has the same bytes and the same number."""
    kept, now, offered, added = Journal(0.0), 0.0, {}, 0
    for step in steps:
        if step == "add":
            kept.add({"kind": "worker_ready", "at": 1.0, "samples": added})
            added += 1
        now += 20.0 if step == "wait" else 0.1
        part = kept.take_part(now) if step in ("take", "fail") else None
        if part is not None:
            assert offered.setdefault(kept.part_number, part) == part
            if step == "take":
                kept.part_written()
    parts = {number: part for number, part in offered.items() if number < kept.part_number}
    written = events_of([*parts.values(), *write_all(kept, now)])
    assert [event["samples"] for event in written] == list(range(added))


def test_the_oldest_progress_is_dropped_first_while_the_root_is_away(monkeypatch):
    """P7: what waits is bounded, and what explains the run is kept longest."""
    monkeypatch.setattr(journal, "MAX_WAITING", 4)
    kept = Journal(0.0)
    kinds = ["worker_lost", "progress", "worker_work", "progress", "worker_ready", "node_left", "outage_started"]
    for at, kind in enumerate(kinds):
        kept.add({"kind": kind, "at": float(at)})
    assert [event["at"] for event in events_of(write_all(kept, 0.0))] == [0.0, 4.0, 5.0, 6.0]
    assert kept.dropped == 3


def test_a_driver_writes_a_bounded_number_of_events(monkeypatch):
    """P7: a cluster that loses workers for ever does not fill the root; how it ended is written anyway."""
    monkeypatch.setattr(journal, "MAX_OTHERS", 3)
    kept = Journal(0.0)
    for _ in range(10):
        kept.add({"kind": "worker_lost", "at": 1.0})
    kept.add({"kind": "run_ended", "at": 2.0, "dropped": kept.dropped})
    written = events_of(write_all(kept, 0.0))
    assert [event["kind"] for event in written] == ["worker_lost"] * 3 + ["run_ended"]
    assert written[-1]["dropped"] == 7


@given(st.floats(1, 30), st.sampled_from([DAY_S / 2, DAY_S, 7 * DAY_S]))
def test_points_in_time_become_rarer(first_s, seconds):
    """The module promises 500 points in a week; 64 (1 + ln(seconds / 64 first_s)) is the number without rounding."""
    pace, now, points = Pace(0.0, first_s), 0.0, 0
    while now < seconds:
        if pace.is_due(now):
            pace.note(now)
            points += 1
        now += 0.2 * pace.interval_s(now)
    assert points <= 64 * (1 + math.log(max(1.0, seconds / (64 * first_s)))) + 2


def test_a_long_night_has_few_parts():
    """P7: a loss every second and a point of progress every ten, for two days."""
    kept, parts = Journal(0.0), 0
    for second in range(2 * DAY_S):
        kept.add({"kind": "worker_lost", "at": float(second)})
        if kept.take_part(float(second)):
            parts += 1
            kept.part_written()
    assert parts <= 64 * (1 + math.log(2 * DAY_S / (64 * journal.FIRST_S))) + journal.MAX_EARLY_PARTS + 2
