"""A map over many items that wait for storage: in threads, in order, with a bounded number of calls ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
A = TypeVar("A")

AHEAD = 4  # calls per thread that are submitted before their turn: one slow call does not leave the other threads idle


def map_in_threads(function: Callable[[A], T], items: Iterable[A], workers: int) -> Iterator[T]:
    """`function(item)` for each of `items`, in their order, computed by `workers` threads.

    At most `AHEAD * workers` calls are submitted and not yet yielded, however many items there are (P7). Raises the
    error of the first item, in order, whose call failed. No call is running or pending when the iterator has ended,
    raised or been closed.
    """
    rest = iter(items)
    pending: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="map")
    try:
        pending.extend(pool.submit(function, item) for item in islice(rest, AHEAD * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
