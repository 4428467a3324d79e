"""Calls that run in the thread of the driver's loop: those that other threads submit, and those that are due at a time.

The loop never blocks on I/O. Threads do the I/O and hand their results over as calls; whatever must wait becomes a
timer. Each call returns the scheduler events that follow from it.
"""

from __future__ import annotations

import heapq
import math
import queue
import time
from collections.abc import Callable
from itertools import count

from hv_batch.job.scheduling.messages import Event

Call = Callable[[], list[Event]]


class LoopCalls:
    """The calls that wait for the loop's thread, in order of submission or of time."""

    def __init__(self) -> None:
        self._submitted: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Call]] = []  # a heap; the number keeps calls of one time in order
        self._serial = count()

    def submit(self, call: Call) -> None:
        """Let the loop make `call` in its next iteration. The only method for other threads."""
        self._submitted.put(call)

    def call_later(self, delay_s: float, call: Call) -> None:
        """Let the loop make `call` once `delay_s` seconds have passed."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._serial), call))

    def seconds_to_next(self, now: float) -> float:
        """Until the next call may be made; 0 if one waits, infinity if there is none."""
        if not self._submitted.empty():
            return 0.0
        return max(0.0, self._timers[0][0] - now) if self._timers else math.inf

    def make_due(self, now: float) -> list[Event]:
        """Make all calls that are due at `now`. Raises what a call raises."""
        events: list[Event] = []
        for _ in range(self._submitted.qsize()):  # what is submitted meanwhile is for the next iteration
            events += self._submitted.get()()
        while self._timers and self._timers[0][0] <= now:
            events += heapq.heappop(self._timers)[2]()
        return events
