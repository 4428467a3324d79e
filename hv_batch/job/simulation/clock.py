"""The clock of a simulation: a heap of calls by their simulated time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    """`now` is in simulated seconds. Calls of equal time are made in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(time, self.now), next(self._order), call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self.now + seconds, call)

    def advance(self) -> None:
        """Go to the time of the next call and make it."""
        self.now, _, call = heapq.heappop(self._heap)
        call()
