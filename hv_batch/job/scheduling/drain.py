"""The drain of a run: until when running tasks may finish, and when denoises write their last step checkpoint."""

from __future__ import annotations

import math

from hv_batch.job.scheduling.workers.worker_slots import LAST_CHECKPOINT_S


class Drain:
    """Starts with a stop request, and ends the run at most `timeout_s` seconds later."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until: float | None = None
        self._last_checkpoint_at = math.inf

    @property
    def has_begun(self) -> bool:
        return self._until is not None

    def begin(self, now: float) -> bool:
        """Returns whether the drain begins now, and not before."""
        if self._until is not None:
            return False
        self._until = now + self._timeout_s
        self._last_checkpoint_at = max(now + LAST_CHECKPOINT_S, self._until - LAST_CHECKPOINT_S)
        return True

    def is_over(self, now: float) -> bool:
        """Whether the run must end, whatever is running."""
        return self._until is not None and now >= self._until

    def take_last_checkpoint(self, now: float) -> bool:
        """Whether the denoises that still run must write their last checkpoint now. It is reported only once."""
        if now < self._last_checkpoint_at:
            return False
        self._last_checkpoint_at = math.inf
        return True
