"""Records what happens in a run as events in the output root (`job/documents/events.py`), without delaying the loop.

A thread writes one part at a time. If it fails, the same part is tried again later, and the events behind it wait, up
to a bound (`job/event_log/journal.py`). A root that refuses events costs their history and nothing else.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from hv_batch import __version__
from hv_batch.job import layout
from hv_batch.job.event_log.journal import Journal, Pace
from hv_batch.job.event_log.work_spans import WorkSpan, WorkSpans
from hv_batch.job.failure import Failure
from hv_batch.job.progress import Snapshot
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.nodes.cluster_view import ClusterView

logger = logging.getLogger(__name__)

PROGRESS_S = 10.0  # between two points of progress at first
CHECK_EVERY_S = 1.0  # for changes of nodes and outages, and for a part that is due
SPANS_EVERY_S = 10.0  # for spans of work that are long enough: it looks at every worker
RETRY_S = 15.0  # after a write that failed

# How long the end of a run waits for the last part; the second, while the output root does not answer.
CLOSE_S = 5.0
CLOSE_AWAY_S = 1.0

Outcome = Literal["finished", "stopped", "failed"]


class EventRecorder:
    """The events of one driver. All methods are for the loop's thread, and none waits for the output root but `close`.

    `reasons` returns the excluded nodes with the reason of each, `is_away` whether the output root does not answer.
    """

    def __init__(
        self, store: Store, cluster: ClusterView, reasons: Callable[[], Mapping[str, str]], is_away: Callable[[], bool]
    ) -> None:
        now = time.monotonic()
        self._store = store
        self._cluster = cluster
        self._reasons = reasons
        self._is_away = is_away
        self.driver = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        self._from_monotonic = time.time() - now
        self._journal = Journal(now)
        self._spans = WorkSpans(now)
        self._progress_pace = Pace(now, PROGRESS_S)
        self._snapshot: Snapshot | None = None
        self._workers: dict[str, dict[str, Any]] = {}  # the fields of each worker that exists
        self._nodes: dict[str, str] | None = None  # the names of those alive at the last check
        self._draining: set[str] = set()
        self._excluded: set[str] = set()
        self._outage_since: float | None = None
        self._is_draining = False
        self._checked_at = self._spans_at = 0.0
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None  # of the last write
        self._retry_at = 0.0
        self._is_refused = False  # the root refuses events: nothing more is written

    # What happens -----------------------------------------------------------------------------------------------------

    def started(self, snapshot: Snapshot) -> None:
        counts = _counts(snapshot)
        self._add("run_started", samples=snapshot.total, version=__version__, host=socket.gethostname(), **counts)

    def worker_asked(self, worker: WorkerId, gpus: float) -> None:
        facts: dict[str, Any] = {"worker": str(worker), "stage": worker.stage.name.lower(), "gpus": float(gpus)}
        self._workers[str(worker)] = facts
        self._add("worker_asked", **facts)

    def worker_placed(self, worker: WorkerId, nodes: Iterable[str]) -> None:
        if facts := self._workers.get(str(worker)):
            facts["nodes"] = sorted(map(self._name, nodes))
            self._add("worker_placed", **facts)

    def worker_ready(self, worker: WorkerId, nodes: Iterable[str]) -> None:
        if facts := self._workers.get(str(worker)):
            facts["nodes"] = sorted(map(self._name, nodes))
            self._add("worker_ready", **facts)

    def task_ended(self, worker: WorkerId, begun: float, samples: int, *, failed: bool) -> None:
        """A task that began at the monotonic time `begun` has ended now."""
        if span := self._spans.task_ended(str(worker), begun, time.monotonic(), samples, failed=failed):
            self._add_span(str(worker), span)

    def worker_lost(self, worker: WorkerId, failure: Failure) -> None:
        self._end_worker(worker, "worker_lost", **{"class": failure.kind.value, "message": failure.first_line})

    def worker_released(self, worker: WorkerId, reason: str) -> None:
        self._end_worker(worker, "worker_released", message=reason)

    def drain_started(self) -> None:
        self._is_draining = True
        self._add("drain_started")

    def _end_worker(self, worker: WorkerId, kind: str, **fields: Any) -> None:
        name = str(worker)
        if span := self._spans.take(name, time.monotonic()):
            self._add_span(name, span)
        self._spans.forget(name)
        self._add(kind, **self._workers.pop(name, {"worker": name}), **fields)

    def _add_span(self, worker: str, span: WorkSpan) -> None:
        self._add(
            "worker_work",
            span.until,
            **self._workers.get(worker, {"worker": worker}),
            since=self._unix(span.since),
            samples=span.samples,
            failed=span.failed,
            seconds=span.seconds,
        )

    def _add(self, kind: str, at: float | None = None, **fields: Any) -> None:
        """`at` is a monotonic time; by default now."""
        self._journal.add({"at": self._unix(time.monotonic() if at is None else at), "kind": kind, **fields})

    def _unix(self, monotonic: float) -> float:
        return monotonic + self._from_monotonic

    # What changes with time -------------------------------------------------------------------------------------------

    def poll(self, snapshot: Snapshot, now: float) -> None:
        """Record the progress and the changes since the last call, and write what is due. May be called at any rate."""
        self._snapshot = snapshot
        if now - self._checked_at < CHECK_EVERY_S:
            return
        self._checked_at = now
        self._note_nodes()
        self._note_outage(snapshot, now)
        if now - self._spans_at >= SPANS_EVERY_S:
            self._spans_at = now
            for worker, span in self._spans.take_due(now, len(self._workers)):
                self._add_span(worker, span)
        if self._progress_pace.is_due(now):
            self._note_progress(now)
        self._write(now)

    def _note_progress(self, now: float) -> None:
        if (snapshot := self._snapshot) is not None:
            self._progress_pace.note(now)
            self._add(
                "progress",
                **_counts(snapshot),
                starting=snapshot.starting,
                encoding=snapshot.encoding,
                denoising=snapshot.denoising,
                decoding=snapshot.decoding,
                spooled=snapshot.spooled,
            )

    def _note_nodes(self) -> None:
        draining = set(self._cluster.draining())
        names = {node: self._name(node) for node in self._cluster.nodes()}
        before = names if self._nodes is None else self._nodes
        for node in names.keys() - before.keys():
            self._add("node_joined", node=names[node])
        for node in draining - self._draining:
            self._add("node_draining", node=names.get(node, node[:8]))
        for node in before.keys() - names.keys():
            self._add("node_left", node=before[node])
        self._nodes, self._draining = names, draining
        reasons = self._reasons()
        for name in sorted(reasons.keys() - self._excluded):
            self._add("node_excluded", node=name.removeprefix("node "), message=reasons[name])
        self._excluded = set(reasons)

    def _note_outage(self, snapshot: Snapshot, now: float) -> None:
        is_away = self._is_away() or snapshot.spooled > 0 or isinstance(self._error, StorageUnavailableError)
        if is_away and self._outage_since is None:
            self._outage_since = now
            self._add("outage_started")
        elif not is_away and self._outage_since is not None:
            self._add("outage_ended", seconds=now - self._outage_since)
            self._outage_since = None

    def _name(self, node: str) -> str:
        """The address of a node and the beginning of its Ray id, because one address may have several nodes."""
        if self._nodes is not None and node in self._nodes:
            return self._nodes[node]
        return f"{self._cluster.nodes().get(node, {}).get('NodeManagerAddress', 'unknown')} ({node[:8]})"

    # Writing ----------------------------------------------------------------------------------------------------------

    def _write(self, now: float) -> None:
        """Begin to write a part, if one is due and no other is being written."""
        if self._is_refused or (self._writer is not None and self._writer.is_alive()):
            return
        if self._writer is not None:
            self._writer = None
            self._note_result(now)
        if now >= self._retry_at and (part := self._journal.take_part(now)) is not None:
            self._start_writer(part)

    def _start_writer(self, part: bytes) -> threading.Thread:
        key = layout.event_part(self.driver, self._journal.part_number)
        # A daemon, because a store that never answers must not keep the process from ending.
        self._writer = threading.Thread(target=self._put, args=(key, part), name="driver-events", daemon=True)
        self._writer.start()
        return self._writer

    def _put(self, key: str, part: bytes) -> None:
        try:
            self._store.put_new(key, part)  # False: an attempt before has arrived
        except (OSError, UserError) as error:
            self._error = error
        else:
            self._error = None

    def _note_result(self, now: float) -> None:
        if self._error is None:
            self._journal.part_written()
        elif isinstance(self._error, StorageUnavailableError):
            self._retry_at = now + RETRY_S
        else:
            logger.warning(f"the events of this run cannot be written, so its timeline ends here: {self._error}")
            self._is_refused, self._error = True, None

    def end(self, outcome: Outcome, message: str = "") -> None:
        """The run has ended; `message` is that of its error."""
        now = time.monotonic()
        for worker in list(self._workers):
            if span := self._spans.take(worker, now):
                self._add_span(worker, span)
        self._note_progress(now)
        if self._is_draining:
            self._add("drain_ended")
        self._add("run_ended", outcome=outcome, message=message, dropped=self._journal.dropped)

    def close(self) -> None:
        """Write the rest. Waits for it a few seconds at most."""
        now = time.monotonic()
        deadline = now + (CLOSE_S if self._outage_since is None else CLOSE_AWAY_S)
        writer = self._writer
        while not self._is_refused:
            if writer is not None:
                writer.join(max(0.0, deadline - time.monotonic()))
                if writer.is_alive():
                    return
                self._note_result(now)
                if self._error is not None:
                    return
            part = self._journal.take_part(now, at_end=True)
            if part is None:
                return
            writer = self._start_writer(part)


def _counts(snapshot: Snapshot) -> dict[str, int]:
    pending = max(0, snapshot.total - snapshot.terminal)
    return {"committed": snapshot.committed, "quarantined": snapshot.quarantined, "pending": pending}
