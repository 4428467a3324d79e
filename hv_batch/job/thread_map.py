"""A map in threads, for calls that wait for storage: ordered results and a bounded number of pending calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
A = TypeVar("A")

AHEAD = 4  # pending calls per thread: one slow call must not leave the other threads idle


def map_in_threads(function: Callable[[A], T], items: Iterable[A], workers: int) -> Iterator[T]:
    """Yields `function(item)` for each of `items`, in their order, computed by `workers` threads.

    At most `AHEAD * workers` results are pending, whatever the number of items (P7). Raises the error of the first
    item, in order, whose call failed. No call is running or pending after the iterator is exhausted or raises. If it is
    closed early, the calls that have not begun are dropped; it does not wait for the others.
    """
    rest = iter(items)
    pending: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="map")
    waits = True
    try:
        pending.extend(pool.submit(function, item) for item in islice(rest, AHEAD * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    except GeneratorExit:
        # The garbage collector may close it, in any thread. A thread that just starts holds a lock that the join of
        # another thread needs (`threading` of Python 3.11), so to wait there is a deadlock.
        waits = False
        raise
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)
