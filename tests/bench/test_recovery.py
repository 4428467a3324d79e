"""What `hv-batch bench group` reads out of its notes; tests/cluster/test_bench_group.py takes real ones."""

from __future__ import annotations

import pytest

from hv_batch.bench.gloo_sleep_engine import (
    BEGUN,
    ENDED,
    JOINED,
    JOINING,
    RESUMED,
    STEP,
    TimedEvent,
    read_notes,
    take_note,
)
from hv_batch.bench.recovery import IdleReport, Rebuild, RebuildReport, gang_in_the_middle, idle_shares, rebuilds


def life(at, pids, begins=BEGUN):
    """A group that joins, and makes four steps of a second."""
    notes = [TimedEvent(at + 0.1 * rank, JOINING, rank, pid) for rank, pid in enumerate(pids)]
    notes += [TimedEvent(at + 0.5 + 0.1 * rank, JOINED, rank, pid) for rank, pid in enumerate(pids)]
    notes += [TimedEvent(at + 1, begins, rank, pid) for rank, pid in enumerate(pids)]
    notes += [TimedEvent(at + 2 + n, STEP, rank, pid) for n in range(4) for rank, pid in enumerate(pids)]
    return sorted(notes, key=lambda note: note.at)


def test_a_kill_is_told_phase_by_phase():
    """The phases follow each other without gap, so they sum up to the time from the kill to the next step."""
    notes = [*life(0, (10, 11)), *life(9, (20, 21), RESUMED)]
    (found,) = rebuilds(notes, killed_at=[5.5], noticed_at=[5.9], ranks=2)
    assert found.phases == pytest.approx([0.4, 3.2, 0.5, 1.4])
    assert sum(found.phases) == pytest.approx(11 - 5.5)


def test_a_sample_is_killed_in_its_middle_and_once():
    """Only samples that have begun anew count: one that goes on after a kill is not killed again for it."""
    first, second = life(0, (10, 11)), life(9, (20, 21), RESUMED)
    assert gang_in_the_middle([], 0) is None
    assert gang_in_the_middle(first[:-2], 0) is None, "its fourth step is not made"
    assert gang_in_the_middle(first, 0) == {0: 10, 1: 11}
    assert gang_in_the_middle([*first, *second], 1) is None


def test_idle_is_what_lies_between_two_denoises():
    """By group, from its first denoise to the end of its last: what comes before and after is not steady."""
    times = [(10, [(0.0, 10.0), (10.5, 20.0)]), (11, [(3.0, 10.0), (10.0, 13.0), (14.0, 23.0)]), (12, [(0.0, 50.0)])]
    notes = [
        TimedEvent(at, what, 0, pid)
        for pid, denoises in times
        for begun, ended in denoises
        for at, what in ((begun, BEGUN), (ended, ENDED))
    ]
    assert idle_shares(sorted(notes, key=lambda note: note.at)) == pytest.approx([0.5 / 20, 1.0 / 20])


def test_notes_are_read_in_the_order_of_time(tmp_path):
    """What several processes have noted is one history."""
    for what in (JOINING, JOINED, BEGUN):
        take_note(str(tmp_path), what, rank=3)
    notes = read_notes(str(tmp_path))
    assert [(note.what, note.rank) for note in notes] == [(JOINING, 3), (JOINED, 3), (BEGUN, 3)]


def test_reports_for_people_hold_the_numbers_of_those_for_machines():
    """Least and median of each phase, and the shares of all groups."""
    report = RebuildReport(4, tuple(Rebuild(notice=n, processes=2.0, meet=0.5, step=0.25) for n in (0.5, 1.0, 3.0)))
    assert report.to_dict()["notice"] == {"took": (0.5, 1.0), "since_kill": (0.5, 1.0)}
    assert report.to_dict()["step"] == {"took": (0.25, 0.25), "since_kill": (3.25, 3.75)}
    assert report.render().splitlines()[-1].split() == ["step", "0.25", "0.25", "3.25", "3.75"]
    idle = IdleReport(steps=10, step_seconds=1.0, samples=6, shares=(0.01, 0.03))
    assert (idle.to_dict()["mean"], idle.to_dict()["groups"]) == (0.02, 2)
    assert "idle 2.00% of the time between two denoises, 1.00% to 3.00% by group" in idle.render()
