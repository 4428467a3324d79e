"""One worker slot of a stage: its restarts, current task and failure count.

A failure may be caused by the sample or by the worker. A slot counts each sample once, however often the sample is
tried there. So a sample that kills every worker cannot use up a healthy slot, but different samples that fail in a row
can. The loss of a node counts against neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import WorkerId

# If this many different samples fail in a row on a worker that survives them, its device or process may be faulty. A
# rebuild is cheap compared to quarantined samples.
MAX_FAILURE_STREAK = 3

# An idle worker that dies after this long was not killed by what it had loaded: its node is gone, or its process was
# killed from outside.
STABLE_AFTER_S = 300.0

MAX_BACKOFF_S = 60.0  # maximum delay of a restart

# Before a draining node goes away, the last step checkpoint is requested early enough for one more step (7 s on eight
# GPUs at 720p) and the upload of 30 MB. The worker is ended while its node still responds.
LAST_CHECKPOINT_S = 30.0
END_MARGIN_S = 5.0


class Status(IntEnum):  # an integer, because the hash of another enum is slow
    ABSENT = 0  # not started, or waiting for the next start
    REQUESTED = 1  # its resources are requested
    LOADING = 2  # holds its resources
    IDLE = 3
    BUSY = 4  # has a task
    ABANDONED = 5  # lost too often in a row; never starts again


READY = frozenset({Status.IDLE, Status.BUSY})
PLACED = READY | {Status.LOADING}
ALIVE = PLACED | {Status.REQUESTED}


@dataclass(slots=True)
class WorkerSlot:
    """Must be changed only by these methods, which keep status, task and retry accounting consistent.

    They call `on_change` after each change of the fields by which `stage_slots.StageSlots` finds slots.
    """

    id: WorkerId
    size_class: int = 0  # of its stage; the same for all incarnations
    status: Status = Status.ABSENT
    requested_at: float = 0.0  # when its resources were requested
    ready_at: float = math.inf
    leaving_at: float | None = None  # when its draining node goes away
    checkpoint_at: float = math.inf  # when a draining worker must next write a step checkpoint
    task: tuple[str, ...] = ()
    task_started_at: float = 0.0
    idle_since: float = 0.0  # if it is idle
    last_heartbeat_at: float = 0.0
    next_within_s: float = math.inf  # the next heartbeat is due this long after the last one
    is_fresh: bool = True  # this incarnation has completed no task
    lora: str = ""  # the LoRAs in the weights of this incarnation: those of its last denoise
    losses: int = 0  # in a row, each sample counted once
    start_at: float = 0.0  # no restart before this time
    counted_samples: set[str] = field(default_factory=set)  # samples whose loss is counted in `losses`
    failed_samples: set[str] = field(default_factory=set)  # samples that failed in a row on the surviving worker
    on_change: Callable[[WorkerSlot], None] = field(default=lambda _slot: None, repr=False, compare=False)

    @property
    def alive(self) -> bool:
        return self.status in ALIVE

    @property
    def is_starting(self) -> bool:
        return self.status in (Status.REQUESTED, Status.LOADING)

    @property
    def has_failure_streak(self) -> bool:
        return len(self.failed_samples) >= MAX_FAILURE_STREAK

    def start(self, now: float) -> None:
        """Request its resources."""
        self.status, self.requested_at = Status.REQUESTED, now
        self.on_change(self)

    def postpone_request(self, requested_at: float) -> None:
        """Count the waiting time for its resources from `requested_at`."""
        self.requested_at = requested_at
        self.on_change(self)

    def note_placed(self) -> None:
        if self.status is Status.REQUESTED:
            self.status = Status.LOADING
            self.on_change(self)

    def become_ready(self, now: float) -> None:
        self.status, self.ready_at, self.idle_since = Status.IDLE, now, now
        self.on_change(self)

    def run(self, keys: tuple[str, ...], now: float) -> None:
        self.task, self.status, self.task_started_at = keys, Status.BUSY, now
        self.note_heartbeat(math.inf, now)

    def note_heartbeat(self, next_within_s: float, now: float) -> None:
        """The task made progress, and its next heartbeat is due within `next_within_s` seconds."""
        self.last_heartbeat_at, self.next_within_s = now, next_within_s
        self.on_change(self)

    def complete_task(self, now: float) -> tuple[str, ...]:
        """End the task as a success, which resets the failure counts. Returns its keys."""
        self.losses, self.is_fresh = 0, False
        self.counted_samples.clear()
        self.failed_samples.clear()
        return self.end_task(now)

    def end_task(self, now: float) -> tuple[str, ...]:
        """End the task, whatever its result. Returns its keys."""
        keys, self.task, self.status, self.idle_since = self.task, (), Status.IDLE, now
        self.on_change(self)
        return keys

    def end(self) -> None:
        """End this incarnation. The caller decides whether and when the next one starts."""
        self.task, self.status, self.ready_at = (), Status.ABSENT, math.inf
        self.leaving_at, self.checkpoint_at, self.is_fresh = None, math.inf, True
        self.lora = ""
        self.failed_samples.clear()
        self.id = WorkerId(self.id.stage, self.id.slot, self.id.incarnation + 1)
        self.on_change(self)

    def pause_until(self, start_at: float) -> None:
        """Do not start before `start_at`."""
        self.start_at = start_at
        self.on_change(self)

    def lose(self, failure: Failure, now: float, max_losses: int, *, counts: bool = True) -> tuple[str, ...]:
        """End this incarnation because of `failure`, and abandon the slot after `max_losses` losses in a row.

        Returns the keys of the lost task. The runtime passes `counts=False` for a loss that excluded a node: of the
        losses that it takes to exclude a node only the others count. A run in which no node works still ends.
        """
        # A failed start involves no sample, so each one counts. A worker that has been ready for long started well.
        is_start = now - self.ready_at < STABLE_AFTER_S
        keys = self.task
        self.end()
        # A lost batch does not count, because its members are tried again alone.
        is_new = is_start if not keys else len(keys) == 1 and keys[0] not in self.counted_samples
        if failure.kind is FailureClass.INFRA and is_new and counts:
            self.losses += 1
            self.counted_samples.update(keys)
        if self.losses >= max_losses:
            self.status = Status.ABANDONED
        delay = min(MAX_BACKOFF_S, 2.0 ** (self.losses - 2)) if self.losses > 1 else 0.0
        self.pause_until(now + delay)
        return keys

    def leave(self, until_s: float, now: float) -> None:
        """A node of the worker is draining and goes away at `until_s`; a later call may change that time."""
        if self.leaving_at is None:
            self.checkpoint_at = now
        self.leaving_at = until_s
        self.on_change(self)

    def must_end(self, now: float) -> bool:
        """Whether the worker is draining and has no task, or no time left for it."""
        return self.leaving_at is not None and (not self.task or now >= self.leaving_at - END_MARGIN_S)

    def take_due_checkpoint(self, now: float) -> bool:
        """Whether a checkpoint is due: once when the drain begins, once near its end. Each is reported only once."""
        if self.leaving_at is None or now < self.checkpoint_at:
            return False
        last = self.leaving_at - LAST_CHECKPOINT_S
        self.checkpoint_at = last if now < last else math.inf
        return True

    def note_failure(self, keys: tuple[str, ...], failure: Failure) -> None:
        """Count a failed task that the worker survived. Batches, outages and inputs that are gone do not count."""
        if len(keys) == 1 and failure.kind not in (FailureClass.OUTAGE, FailureClass.PREEMPTED):
            self.failed_samples.update(keys)
