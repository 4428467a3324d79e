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
from hv_batch.job.records import lease, lease_holder
from hv_batch.job.records.lease import Lease, LeaseHeldError, LeaseLostError, hold_lease, refuse_other_holder
from hv_batch.job.records.lease_holder import is_gone, read_lease, this_process
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
    store.put(layout.LEASE, lease_holder.encode_holder(holder))


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
from hv_batch.job.records.lease import hold_lease
from hv_batch.job.records.lease_holder import this_process
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
        with hold_lease(any_store, new_holder, wait=lambda _: first.heartbeat(), steal=True) as second:
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


def killed_after(process, waits, seconds=None):
    """A `wait` that kills a process at a number of waits; `seconds` collects its arguments."""
    left = [waits]

    def wait(pause_s):
        if seconds is not None:
            seconds.append(pause_s)
        left[0] -= 1
        if left[0] == 0:
            process.kill()
            process.wait()
        return False

    return wait


def test_a_take_over_waits_until_the_former_process_has_ended(tmp_path):
    """P1: on the same machine the end of the process is seen, and nothing is changed before."""
    store, sleeper = Store(str(tmp_path)), subprocess.Popen(["sleep", "1000"])
    process = lease_holder._process_start(sleeper.pid)
    put(store, dataclasses.replace(this_process("run"), pid=sleeper.pid, process=process))
    seconds = []
    with hold_lease(store, this_process("gc"), steal=True, wait=killed_after(sleeper, 5, seconds)) as mine:
        assert len(seconds) == 5
        mine.check()
    assert read_lease(store) is None, "the former holder is known to have ended"


def test_a_take_over_waits_while_the_former_holder_may_act(any_store):
    """P1: on another machine it has stopped after STALE_S of silence, counted from its last heartbeat."""
    theirs = elsewhere(beats=5)
    put(any_store, theirs)
    waits = []

    def wait(pause_s):
        waits.append(pause_s)
        if len(waits) == 3:  # a heartbeat that had begun before the take-over
            put(any_store, dataclasses.replace(theirs, beats=6))
        return False

    me = this_process("gc")
    with hold_lease(any_store, me, steal=True, wait=wait) as mine:
        assert sum(waits) == lease.STALE_S + 3 * lease.POLL_S
        mine.heartbeat()
        mine.check()
        assert read_lease(any_store).token == me.token


def test_a_holder_finds_a_take_over_that_has_already_ended(any_store):
    """P1: `gc --take-over` ends in seconds; the driver that was cut off meanwhile must not go on when it comes back."""
    put(any_store, elsewhere())
    theirs = Lease(any_store, read_lease(any_store))
    with hold_lease(any_store, this_process("gc"), steal=True, wait=lambda _: False):
        pass
    theirs.heartbeat()
    with pytest.raises(LeaseLostError, match="hv-batch gc"):
        theirs.check()
    theirs.release()


def test_a_third_process_ends_a_take_over(any_store):
    """P1: of two take-overs at the same time, one acts."""
    put(any_store, elsewhere())
    third = elsewhere(since="third")
    with (
        pytest.raises(LeaseHeldError),
        hold_lease(any_store, this_process("gc"), steal=True, wait=lambda _: put(any_store, third)),
    ):
        pass
    assert read_lease(any_store).token == third.token


def test_a_stop_ends_the_wait_of_a_take_over(any_store):
    """Exit codes: the command ends at once and has changed nothing but the lease."""
    put(any_store, elsewhere())
    with hold_lease(any_store, this_process("gc"), steal=True, wait=lambda _: True) as mine:
        assert mine is None


def test_a_holder_that_is_silent_for_too_long_stops_itself(s3, s3_store, monkeypatch):
    """P1: another process may have taken over. A run bears an outage for longer than a command does."""
    now = [1000.0]
    monkeypatch.setattr(lease, "_seconds", lambda: now[0])
    with (
        hold_lease(s3_store, this_process("gc"), wait=never) as command,
        hold_lease(Store(f"{s3_store.url}/2"), this_process("run"), wait=never, silence_s=1800) as run,
    ):
        s3.refusal = (503, "SlowDown")
        now[0] += lease.STALE_S - 1
        command.check()
        now[0] += 2
        with pytest.raises(LeaseLostError, match="has not accepted a heartbeat of this process for 61 s"):
            command.check()
        run.check()
        now[0] += 1800
        with pytest.raises(LeaseLostError, match="not accepted a heartbeat"):
            run.check()
        s3.refusal = None


def test_a_process_that_was_suspended_looks_before_it_acts(any_store, monkeypatch):
    """P1: after a SIGSTOP or a paused machine, the next act comes before the next heartbeat."""
    now = [1000.0]
    monkeypatch.setattr(lease, "_seconds", lambda: now[0])
    with hold_lease(any_store, this_process("run"), wait=never, silence_s=1800) as mine:
        put(any_store, elsewhere())
        now[0] += 600
        with pytest.raises(LeaseLostError, match="node-7"):
            mine.check()


def test_workers_write_only_while_their_run_holds_the_lease(any_store):
    """P1: workers may reach the store while the driver does not, so they compare the lease themselves."""
    refuse_other_holder(any_store, "a run")
    theirs = elsewhere()
    put(any_store, theirs)
    refuse_other_holder(any_store, theirs.token)
    with pytest.raises(LeaseLostError, match="node-7"):
        refuse_other_holder(any_store, "a run")


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
