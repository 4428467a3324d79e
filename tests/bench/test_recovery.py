"""hv_batch.bench.recovery: measurements from synthetic events; tests/cluster/test_bench_group.py runs the command."""

from __future__ import annotations

import logging

import pytest

from hv_batch.bench.gloo_sleep_engine import (
    BEGUN,
    ENDED,
    JOINED,
    JOINING,
    RESUMED,
    STEP,
    TimedEvent,
    read_events,
    record_event,
)
from hv_batch.bench.recovery import (
    IdleReport,
    LossObserver,
    Rebuild,
    RebuildReport,
    idle_shares,
    pids_to_kill,
    rebuilds,
)


def group_events(at, pids, begins=BEGUN):
    """The events of a group that joins and then does four steps of one second."""
    events = [TimedEvent(at + 0.1 * rank, JOINING, rank, pid) for rank, pid in enumerate(pids)]
    events += [TimedEvent(at + 0.5 + 0.1 * rank, JOINED, rank, pid) for rank, pid in enumerate(pids)]
    events += [TimedEvent(at + 1, begins, rank, pid) for rank, pid in enumerate(pids)]
    events += [TimedEvent(at + 2 + n, STEP, rank, pid) for n in range(4) for rank, pid in enumerate(pids)]
    return sorted(events, key=lambda event: event.at)


def test_the_phases_of_a_rebuild_have_no_gap():
    """The phases sum up to the time from the kill to the next step."""
    events = [*group_events(0, (10, 11)), *group_events(9, (20, 21), RESUMED)]
    (rebuild,) = rebuilds(events, killed_at=[5.5], noticed_at=[5.9], ranks=2)
    assert rebuild.phases == pytest.approx([0.4, 3.2, 0.5, 1.4])
    assert sum(rebuild.phases) == pytest.approx(11 - 5.5)


def test_each_sample_loses_one_rank_in_its_middle():
    """Only denoises that begin at step 0 count: a sample that resumes after a kill is not killed again."""
    first, second = group_events(0, (10, 11)), group_events(9, (20, 21), RESUMED)
    assert pids_to_kill([], 0) is None
    assert pids_to_kill(first[:-2], 0) is None, "the fourth step is not done"
    assert pids_to_kill(first, 0) == {0: 10, 1: 11}
    assert pids_to_kill([*first, *second], 1) is None


def test_idle_time_is_the_time_between_two_denoises():
    """Idle time of a group is measured from its first to its last denoise, without the start and the end of the run."""
    times = [(10, [(0.0, 10.0), (10.5, 20.0)]), (11, [(3.0, 10.0), (10.0, 13.0), (14.0, 23.0)]), (12, [(0.0, 50.0)])]
    events = [
        TimedEvent(at, what, 0, pid)
        for pid, denoises in times
        for begun, ended in denoises
        for at, what in ((begun, BEGUN), (ended, ENDED))
    ]
    assert idle_shares(sorted(events, key=lambda event: event.at)) == pytest.approx([0.5 / 20, 1.0 / 20])


def test_only_loss_report_during_a_denoise_are_observed():
    """`notice` ends when the driver logs an INFRA failure of a denoise group that has a sample."""
    observer = LossObserver()
    for fields, message in [
        ({"worker": "denoise-0.0", "sample": "a"}, "denoise-0.0 with a: INFRA: lost"),
        ({"worker": "denoise-0.0", "sample": None}, "denoise-0.0: INFRA: lost"),
        ({"worker": "decode-0.0", "sample": "a"}, "decode-0.0 with a: INFRA: lost"),
        ({"worker": "denoise-0.0", "sample": "a"}, "denoise-0.0 with a: POISON: bad"),
    ]:
        observer.emit(logging.makeLogRecord({"msg": message, **fields}))
    assert len(observer.noticed_at) == 1


def test_events_are_read_in_order(tmp_path):
    """The events of all processes form one list, ordered by time."""
    for what in (JOINING, JOINED, BEGUN):
        record_event(str(tmp_path), what, rank=3)
    events = read_events(str(tmp_path))
    assert [(event.what, event.rank) for event in events] == [(JOINING, 3), (JOINED, 3), (BEGUN, 3)]


def test_text_and_json_reports_hold_the_same_numbers():
    """Both have minimum and median of each phase, and the idle shares."""
    report = RebuildReport(4, tuple(Rebuild(notice=n, processes=2.0, meet=0.5, step=0.25) for n in (0.5, 1.0, 3.0)))
    assert report.to_dict()["notice"] == {"took": (0.5, 1.0), "since_kill": (0.5, 1.0)}
    assert report.to_dict()["step"] == {"took": (0.25, 0.25), "since_kill": (3.25, 3.75)}
    assert report.render().splitlines()[-1].split() == ["step", "0.25", "0.25", "3.25", "3.75"]
    idle = IdleReport(steps=10, step_seconds=1.0, samples=6, shares=(0.01, 0.03))
    assert (idle.to_dict()["mean"], idle.to_dict()["groups"]) == (0.02, 2)
    assert "idle 2.00% of the time, 1.00% to 3.00% by group" in idle.render()
