"""Measures how long the iterations of the driver's loop take, without the time that they wait for events."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

WARN_S = 1.0  # a worker's progress is polled once a second


class LoopTimer:
    """`busy_max_s` is the longest iteration that began while a worker had a task.

    Before the first task, Ray exports the actor classes, which takes up to 0.1 s of CPU time and delays no worker.
    """

    def __init__(self) -> None:
        self.busy_max_s = 0.0
        self._recent_max_s = 0.0

    @contextmanager
    def iteration(self, *, is_busy: bool) -> Iterator[None]:
        """Time the body of the `with`; one that takes longer than WARN_S is logged."""
        begun = time.monotonic()
        yield
        seconds = time.monotonic() - begun
        if is_busy:
            self.busy_max_s = max(self.busy_max_s, seconds)
        self._recent_max_s = max(self._recent_max_s, seconds)
        if seconds > WARN_S:
            logger.warning(f"one iteration of the driver's loop took {seconds:.1f} s; workers were not heard meanwhile")

    def take_recent_max_s(self) -> float:
        """The longest iteration since the last call."""
        seconds, self._recent_max_s = self._recent_max_s, 0.0
        return seconds
