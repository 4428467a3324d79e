"""A thread that does I/O for the driver's loop.

Acts run one after the other in the order of their submission. An act that finds the output root unreachable is tried
again after a pause, and the acts behind it wait. The begin and the end of an outage, the result of each act and any
other error are handed to the loop's thread as calls (see `loop_calls`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn, TypeVar

from hv_batch.job.scheduling.limits import OUTAGE_PAUSE_S
from hv_batch.job.scheduling.messages import Event
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.runtime.driver.loop_calls import LoopCalls
from hv_batch.runtime.driver.outage import Outage

T = TypeVar("T")


class WorkerClosedError(Exception):
    """The worker was closed while an act waited for the output root."""


class IoWorker:
    """Its methods are for the loop's thread, except `retry`. `outage` is only touched in the loop's thread, too."""

    def __init__(self, name: str, calls: LoopCalls, outage: Outage) -> None:
        self._calls = calls
        self._outage = outage
        self._acts: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending = 0  # acts whose result the loop has not handled
        self._closed = threading.Event()
        self._pausing = threading.Event()
        # A daemon, because a store that never answers must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"driver-{name}", daemon=True)
        self._started = False

    @property
    def has_pending(self) -> bool:
        """Whether the result of an act has not been handled yet."""
        return self._pending > 0

    @property
    def is_running(self) -> bool:
        """Whether a result may come any moment: false during the pause of an outage."""
        return self.has_pending and not self._pausing.is_set()

    def submit(self, act: Callable[[], T], then: Callable[[T], list[Event]], *, once: bool = False) -> None:
        """Run `act` in the thread, and `then` with its result in the loop's thread.

        `once` is for an act that calls `retry` itself, for its parts. An error of `act`, other than an outage, is
        raised in the loop's thread.
        """
        self._pending += 1

        def handle(result: T) -> list[Event]:
            self._pending -= 1
            return then(result)

        def run() -> None:
            result = act() if once else self.retry(act)
            self._calls.submit(lambda: handle(result))

        self._acts.put(run)
        if not self._started:
            self._started = True
            self._thread.start()

    def retry(self, act: Callable[[], T]) -> T:
        """Call `act` until the output root answers, and return its result; for the worker's own thread.

        Raises WorkerClosedError if the worker is closed in the meantime.
        """
        is_away = False
        while True:
            try:
                result = act()
            except StorageUnavailableError as error:
                is_away = True
                self._calls.submit(partial(self._note_outage, error))
                self._pausing.set()
                self._closed.wait(OUTAGE_PAUSE_S)
                self._pausing.clear()
                if self._closed.is_set():
                    raise WorkerClosedError from error
            else:
                if is_away:
                    self._calls.submit(self._note_end_of_outage)
                return result

    def close(self, *, wait_s: float = 0.0) -> None:
        """End the thread after the act that is running, and wait for that at most `wait_s` seconds.

        The acts behind it are dropped.
        """
        self._closed.set()
        self._acts.put(None)
        if self._started:
            self._thread.join(wait_s)

    def _work(self) -> None:
        while (act := self._acts.get()) and not self._closed.is_set():
            try:
                act()
            except WorkerClosedError:
                return
            except Exception as error:  # noqa: BLE001  (raised again, in the loop's thread)
                self._calls.submit(partial(_raise, error))
                return

    def _note_outage(self, error: StorageUnavailableError) -> list[Event]:
        self._outage.note_failure(error, time.monotonic())
        return []

    def _note_end_of_outage(self) -> list[Event]:
        self._outage.note_success(time.monotonic())
        return []


def _raise(error: Exception) -> NoReturn:
    raise error
