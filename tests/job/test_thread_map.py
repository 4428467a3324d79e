"""hv_batch.job.thread_map: the results of a sequential map, with bounded work ahead and no work left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from hv_batch.job.thread_map import AHEAD, map_in_threads
from tests.support.repository import ROOT

WORKERS = 3


def test_results_come_in_the_order_of_the_items():
    """Calls that end out of order are yielded in order."""

    def slow_first(item):
        time.sleep(0.05 if item == 0 else 0)
        return item * item

    assert list(map_in_threads(slow_first, range(20), WORKERS)) == [item * item for item in range(20)]


def test_calls_run_side_by_side():
    """All workers are in use: each call waits for the others."""
    meeting = threading.Barrier(WORKERS, timeout=10)
    assert len(list(map_in_threads(lambda _: meeting.wait(), range(2 * WORKERS), WORKERS))) == 2 * WORKERS


def test_items_are_taken_as_results_are_consumed():
    """P7: an endless iterable is read only so far ahead."""
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield taken[-1]

    results = map_in_threads(lambda item: item, endless(), WORKERS)
    for number in range(50):
        assert next(results) == number
        assert len(taken) <= number + 1 + AHEAD * WORKERS
    results.close()


def test_the_first_error_in_order_is_raised_and_the_rest_cancelled():
    """A later item that fails earlier does not hide it; no call runs after the error was raised."""
    failed, started = threading.Event(), []

    def fail(item):
        started.append(item)
        if item == 1:
            failed.wait(10)
            raise ValueError("first")
        if item == 2:
            failed.set()
            raise KeyError("second")

    results = map_in_threads(fail, range(1000), WORKERS)
    with pytest.raises(ValueError, match="first"):
        list(results)
    before = len(started)
    assert before <= 2 + AHEAD * WORKERS
    time.sleep(0.1)
    assert len(started) == before


def test_an_iterator_that_is_closed_does_not_wait_for_the_calls_that_run():
    """The garbage collector may close it in a thread that must not wait, such as one that just starts. Calls that have
    not begun are dropped.
    """
    may_end, started, ended = threading.Event(), [], threading.Semaphore(0)

    def work(item):
        started.append(item)
        if item > 0:
            may_end.wait(10)
        ended.release()

    results = map_in_threads(work, range(1000), WORKERS)
    next(results)
    closing = threading.Thread(target=results.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive(), "it waits for the running calls"
    assert not may_end.is_set()
    begun = len(started)
    assert begun <= 1 + WORKERS
    may_end.set()
    for _ in range(begun):
        assert ended.acquire(timeout=10)
    assert len(started) == begun


COLLECTED_WHILE_A_THREAD_STARTS = """
import gc, threading, time
from hv_batch.job.thread_map import map_in_threads

iterator = map_in_threads(lambda item: item and time.sleep(0.5), range(100), 3)
next(iterator)
cycle = [iterator]
cycle.append(cycle)
del cycle, iterator
with getattr(threading, "_shutdown_locks_lock", threading.Lock()):  # Python up to 3.12 holds it in Thread._bootstrap
    gc.collect()
print("collected")
"""


def test_a_garbage_collection_in_a_thread_that_starts_does_not_deadlock():
    """The garbage collector closes an iterator that is part of a reference cycle, wherever it happens to run."""
    command = [sys.executable, "-c", COLLECTED_WHILE_A_THREAD_STARTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "collected\n", done.stderr
