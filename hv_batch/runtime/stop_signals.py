"""Stop requests: SIGTERM, SIGINT and SIGHUP of a command that must end with its own exit code and last line.

A stop request always sets an event. What else it does depends on the moment: while there is work to drain it does
nothing else, and elsewhere it raises KeyboardInterrupt, so that a long check, an unreachable store or a start of Ray
does not delay the end.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import Any

# `timeout`, systemd and a terminal signal a process twice, by itself and with its group. That is one request.
REPEAT_S = 1.0

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """Turns stop signals into the event `stopped`, and into KeyboardInterrupt where that is allowed.

    Within `interruptible` the first request raises KeyboardInterrupt. Elsewhere it only sets the event, and another one
    after `REPEAT_S` raises KeyboardInterrupt. Must be used in the main thread.
    """

    def __init__(self, stopped: Event | None = None) -> None:
        self.stopped = stopped or Event()
        self._is_interruptible = False
        self._last: float | None = None  # monotonic time of the last request

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals within the block. A signal that the parent has set to be ignored (nohup) stays so."""
        before = self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> dict[int, Any]:
        """Install the handlers; returns the ones before. Necessary again after `ray.init` and `ray.shutdown`."""
        return {
            number: signal.signal(number, self._request)
            for number in STOP_SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the first request raise KeyboardInterrupt within the block."""
        before, self._is_interruptible = self._is_interruptible, True
        try:
            yield
        finally:
            self._is_interruptible = before

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop was requested."""
        if self.stopped.is_set():
            raise KeyboardInterrupt

    def _request(self, number: int, frame: FrameType | None) -> None:
        # Ray's own handler, which is active until the end of `ray.init`, calls this one and lets an alarm abort the
        # process three seconds later.
        signal.alarm(0)
        now, last = time.monotonic(), self._last
        if last is not None and now - last < REPEAT_S:
            return
        self._last = now
        self.stopped.set()
        if last is not None or self._is_interruptible:
            raise KeyboardInterrupt
