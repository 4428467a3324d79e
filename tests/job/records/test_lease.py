"""The lease of an output root: how a second process finds the first (P1, P2)."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest

from hv_batch.job import layout
from hv_batch.job.records import lease
from hv_batch.job.records.lease import (
    Lease,
    LeaseHeldError,
    LeaseLostError,
    hold_lease,
    is_gone,
    read_lease,
    this_process,
)
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from tests.support.repository import ROOT


@pytest.fixture(autouse=True)
def no_heartbeat(monkeypatch):
    """Heartbeats are sent only by the tests, not by the timer."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 3600.0)


def never(seconds):
    raise AssertionError("nothing had to be waited for")


def elsewhere(**changes):
    """A holder on another machine."""
    return dataclasses.replace(this_process("run", "raysubmit_1"), host="node-7", machine="another", **changes)


def put(store, holder):
    store.put(layout.LEASE, lease._encode(holder))


def test_the_lease_exists_while_it_is_held(any_store):
    """P1: an operator can read which process writes; a normal end removes the lease."""
    me = this_process("run", "raysubmit_1")
    with hold_lease(any_store, me, wait=never):
        found = read_lease(any_store)
        assert (found.token, found.pid, found.job) == (me.token, os.getpid(), "raysubmit_1")
        assert is_gone(found) is False
    assert read_lease(any_store) is None


def test_a_failed_run_releases_the_lease(any_store):
    """P2: after any error, the same command can start at once."""
    with pytest.raises(ZeroDivisionError), hold_lease(any_store, this_process("run"), wait=never):
        raise ZeroDivisionError
    with hold_lease(any_store, this_process("run"), wait=never) as mine:
        assert mine is not None


def test_a_second_process_is_refused_with_a_description_of_the_first(any_store):
    """P1: host, process, job, start and last heartbeat, at once on the same machine; the first is not affected."""
    first = this_process("run", "raysubmit_1")
    with hold_lease(any_store, first, wait=never) as mine:
        with pytest.raises(LeaseHeldError) as caught, hold_lease(any_store, this_process("run"), wait=never):
            pass
        for fact in (first.host, str(os.getpid()), "raysubmit_1", first.since, first.beat_at, "--take-over"):
            assert fact in str(caught.value)
        mine.heartbeat()
        mine.check()


def test_the_lease_of_a_killed_driver_on_this_machine_is_replaced_at_once(tmp_path):
    """P2: after a SIGKILL, the same command sees that the process does not exist, and does not wait."""
    store = Store(str(tmp_path / "root"))
    script = """
import os, sys, signal
from hv_batch.job.records.lease import hold_lease, this_process
from hv_batch.job.storage.store import Store
with hold_lease(Store(sys.argv[1]), this_process("run")):
    print("held", flush=True)
    sys.stdin.read()
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "root")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert driver.stdout.readline() == "held\n"
    with pytest.raises(LeaseHeldError, match=str(driver.pid)), hold_lease(store, this_process("run"), wait=never):
        pass
    driver.kill()
    # Not reaped yet: a zombie counts as ended.
    os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)
    with hold_lease(store, this_process("run"), wait=never) as mine:
        assert mine is not None
    driver.communicate()


def test_a_reused_process_id_is_another_process(any_store):
    """P2: after a reboot, or after many processes, the id may belong to another process."""
    put(any_store, dataclasses.replace(this_process("run"), process="1"))
    with hold_lease(any_store, this_process("run"), wait=never) as mine:
        assert mine is not None


def test_a_running_driver_on_another_machine_is_recognised_by_its_heartbeats(any_store, logged):
    """P1: whatever its clock is, its heartbeat count increases while it is watched."""
    theirs = elsewhere(beats=5, beat_at="2001-01-01T00:00:00+00:00")
    theirs = dataclasses.replace(theirs, beat_at=(datetime.now(UTC) - timedelta(hours=5)).isoformat())
    put(any_store, theirs)
    looks = []

    def wait(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            put(any_store, dataclasses.replace(theirs, beats=6))
        return False

    with (
        pytest.raises(LeaseHeldError, match="node-7"),
        hold_lease(any_store, this_process("run"), wait=wait),
    ):
        pass
    assert len(looks) == 3
    assert "node-7" in logged[0]
    assert read_lease(any_store).token == theirs.token


def test_a_dead_driver_on_another_machine_is_replaced_after_a_minute(any_store):
    """P2: no heartbeat for STALE_S, whatever the clocks are (this holder's is ahead)."""
    put(any_store, elsewhere(beat_at=(datetime.now(UTC) + timedelta(days=2)).isoformat()))
    waited = []
    with hold_lease(any_store, this_process("run"), wait=lambda s: waited.append(s) or False) as mine:
        assert sum(waited) == lease.STALE_S
        mine.heartbeat()
        mine.check()


def test_a_stop_ends_the_wait(any_store):
    """Exit codes: SIGTERM ends the wait, and the lease is not changed."""
    theirs = elsewhere()
    put(any_store, theirs)
    with hold_lease(any_store, this_process("run"), wait=lambda _: True) as mine:
        assert mine is None
    assert read_lease(any_store).token == theirs.token


@pytest.mark.parametrize("beat_at", ["2001-01-01T00:00:00+00:00", "not a time"])
def test_only_an_ancient_lease_is_not_watched(any_store, beat_at):
    """P2: a lease that is days old is replaced at once; one with an invalid time is watched."""
    put(any_store, elsewhere(beat_at=beat_at))
    waited = []
    with hold_lease(any_store, this_process("run"), wait=lambda s: waited.append(s) or False):
        assert bool(waited) == (beat_at == "not a time")


def test_a_lease_that_was_taken_over_stops_its_holder(any_store):
    """P1: the first driver finds the new holder at its next heartbeat, and does not remove the new lease."""
    with hold_lease(any_store, this_process("run"), wait=never) as first:
        new_holder = this_process("run", "raysubmit_2")
        with hold_lease(any_store, new_holder, wait=never, steal=True) as second:
            first.check()
            first.heartbeat()
            with pytest.raises(LeaseLostError, match="raysubmit_2"):
                first.check()
            first.release()
            assert read_lease(any_store).token == new_holder.token
            second.heartbeat()
            second.check()


def test_of_many_concurrent_processes_one_holds_the_lease(any_store):
    """P1: a stale lease has one new holder after each process has sent a heartbeat."""
    put(any_store, dataclasses.replace(this_process("run"), process="1"))
    taken, barrier = [], threading.Barrier(6)

    def take():
        barrier.wait()
        me = this_process("run")
        try:
            if lease._acquire(any_store, me, False, never):
                taken.append(Lease(any_store, me))
        except LeaseHeldError:
            pass

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in taken:
        one.heartbeat()
    lost = 0
    for one in taken:
        try:
            one.check()
        except LeaseLostError:
            lost += 1
    assert len(taken) - lost == 1
    for one in taken:
        one.release()
    assert read_lease(any_store) is None


@pytest.mark.parametrize("junk", [b"", b"[]", b"{}", b"null", b"\xff", encode({"token": 1})])
def test_a_file_that_is_not_a_lease_is_replaced(any_store, junk):
    """P2: an invalid file does not prevent a run."""
    any_store.put(layout.LEASE, junk)
    assert read_lease(any_store) is None
    with hold_lease(any_store, this_process("run"), wait=never):
        assert read_lease(any_store) is not None


def test_a_deleted_lease_is_written_again(any_store):
    """P1: the holder keeps the lease if the file is deleted."""
    with hold_lease(any_store, this_process("run"), wait=never) as mine:
        any_store.delete(layout.LEASE)
        mine.heartbeat()
        mine.check()
        assert read_lease(any_store) is not None


def test_an_outage_does_not_end_the_heartbeat(s3, s3_store, monkeypatch):
    """P5: failed heartbeats are repeated; the run handles the outage itself."""
    with hold_lease(s3_store, this_process("run"), wait=never):
        pass
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    with hold_lease(s3_store, this_process("run"), wait=never) as mine:
        s3.faults = [503] * 40
        seen = read_lease_when(s3_store, s3, lambda found: found.beats > 3)
        mine.check()
        assert seen.beats > 3


def read_lease_when(store, s3, condition):
    while True:  # bounded by the time limit of the test
        if not s3.faults and (found := read_lease(store)) is not None and condition(found):
            return found
        threading.Event().wait(0.01)
