"""The I/O threads of the driver and the calls that they hand to its loop."""

from __future__ import annotations

import threading
import time

import pytest

from hv_batch.job.scheduling.messages import Published
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.protocol import UserError
from hv_batch.runtime.driver import io_worker
from hv_batch.runtime.driver.io_worker import IoWorker
from hv_batch.runtime.driver.loop_calls import LoopCalls

AWAY = StorageUnavailableError("s3://bucket/run: 503")
DEADLINE_S = 60


class OutageLog:
    """Stands for `Outage`: records its calls and their threads."""

    def __init__(self):
        self.notes = []

    def note_failure(self, error, _now):
        self.notes.append((str(error), threading.get_ident()))

    def note_success(self, _now):
        self.notes.append(("over", threading.get_ident()))


@pytest.fixture
def calls():
    return LoopCalls()


@pytest.fixture
def outage():
    return OutageLog()


@pytest.fixture
def worker(calls, outage, monkeypatch):
    monkeypatch.setattr(io_worker, "OUTAGE_PAUSE_S", 0.01)
    worker = IoWorker("test", calls, outage)
    yield worker
    worker.close(wait_s=DEADLINE_S)


def run_until(calls, condition):
    """What the loop does; the events."""
    events, deadline = [], time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        events += calls.make_due(time.monotonic())
        time.sleep(0.001)
    return events


def test_results_come_in_order_and_in_the_loops_thread(calls, outage, worker):
    """P1: acts on the output root are done in the order of their submission, an outage included."""
    faults, done, threads = [AWAY, AWAY], [], []

    def act(name):
        if name == "b" and faults:
            raise faults.pop()
        threads.append(threading.get_ident())
        return name

    def then(name):
        done.append((name, threading.get_ident()))
        return [Published(name)]

    for name in "abc":
        worker.submit(lambda name=name: act(name), then)
    assert worker.has_pending
    events = run_until(calls, lambda: not worker.has_pending)
    here = threading.get_ident()
    assert events == [Published("a"), Published("b"), Published("c")]
    assert done == [("a", here), ("b", here), ("c", here)]
    assert outage.notes == [(str(AWAY), here), (str(AWAY), here), ("over", here)]
    assert here not in threads


def test_an_error_of_an_act_ends_the_run(calls, worker):
    """Design section 6: it is raised where the loop makes its calls; nothing behind the act is done."""
    done = []

    def refuse():
        raise UserError("refused")

    worker.submit(refuse, lambda _: [])
    worker.submit(lambda: done.append(1), lambda _: [])
    with pytest.raises(UserError, match="refused"):
        run_until(calls, lambda: False)
    worker.close(wait_s=DEADLINE_S)
    assert done == []


def test_a_closed_worker_drops_what_waits_for_an_outage(calls, worker, monkeypatch):
    """P2: a stop does not wait for the output root, nor for the acts behind."""
    monkeypatch.setattr(io_worker, "OUTAGE_PAUSE_S", 3600.0)
    tries = []

    def away():
        tries.append(1)
        raise AWAY

    worker.submit(away, lambda _: [])
    worker.submit(lambda: tries.append(2), lambda _: [])
    run_until(calls, lambda: tries and not worker.is_running)
    assert worker.has_pending
    worker.close(wait_s=DEADLINE_S)
    assert not worker._thread.is_alive()
    assert tries == [1]


def test_timers_are_due_in_order_and_not_before(calls):
    """A timer replaces every wait of the loop: it asks how long it may wait, and makes what is due."""
    calls.call_later(20.0, lambda: [Published("late")])
    calls.call_later(10.0, lambda: [Published("early")])
    now = time.monotonic()
    assert 9.0 < calls.seconds_to_next(now) <= 10.0
    assert calls.make_due(now) == []
    calls.submit(lambda: [Published("at once")])
    assert calls.seconds_to_next(now) == 0.0
    assert calls.make_due(now + 20.0) == [Published("at once"), Published("early"), Published("late")]
    assert calls.seconds_to_next(now) == float("inf")
