"""Looks shards up in the output root in a thread, a bounded number ahead of the driver's loop."""

from __future__ import annotations

import threading
from collections import deque

from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.records.shard_scan import Pending, ShardScan
from hv_batch.job.scheduling.messages import Event
from hv_batch.runtime.driver.io_worker import IoWorker, WorkerClosedError

# Scans that the loop has not taken. Those of finished shards are small, and a resume passes thousands of them; the
# others hold the samples of a shard (P7).
MAX_SCANS = 256
MAX_UNFINISHED_SCANS = 2


class ShardLookups:
    """The pending samples of a run, in the order of the manifest. Its public methods are for the loop's thread."""

    def __init__(self, pending: PendingSamples, worker: IoWorker) -> None:
        self._source = pending
        self._worker = worker
        self._pending: deque[Pending] = deque()  # of the shard that the loop has come to
        self._scans: deque[ShardScan] = deque()
        self._changed = threading.Condition()  # of the scans, or of the flag
        self._closed = False
        self._started = False
        self._ended = False

    @property
    def is_running(self) -> bool:
        """Whether a sample may come any moment, unless some wait already."""
        return self._worker.is_running

    @property
    def is_exhausted(self) -> bool:
        """Whether all samples have been taken."""
        return self._ended and not self._scans and not self._pending

    def next(self) -> Pending | None:
        """The next pending sample; None if its shard has not been looked up yet, or if there is none.

        The first call starts the look-ups.
        """
        if not self._started:
            self._started = True
            self._worker.submit(self._scan, self._note_end, once=True)
        while not self._pending:
            with self._changed:
                if not self._scans:
                    return None
                scan = self._scans.popleft()
                self._changed.notify_all()
            self._source.enter(scan)
            self._pending.extend(scan.pending)
        return self._pending.popleft()

    def close(self) -> None:
        """End the look-ups."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._source.scanner.close()
        self._worker.close()

    def _scan(self) -> None:
        """In the worker's thread."""
        for scan in self._source.scanner.scans(self._worker.retry):
            with self._changed:
                self._changed.wait_for(self._may_go_on)
                if self._closed:
                    raise WorkerClosedError
                self._scans.append(scan)

    def _may_go_on(self) -> bool:
        unfinished = sum(bool(scan.pending) for scan in self._scans)
        return self._closed or (len(self._scans) < MAX_SCANS and unfinished < MAX_UNFINISHED_SCANS)

    def _note_end(self, _: None) -> list[Event]:
        self._ended = True
        return []
