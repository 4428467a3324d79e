"""One worker slot of a stage: its lives, its task, and what speaks against it.

A failure may be the sample's fault or the worker's. A slot counts each sample once, however often it is tried there, so
that one sample which kills every worker it meets cannot use up a healthy slot; different samples failing in a row can.
A node that is taken away speaks against neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import WorkerId

# Three different samples that fail in a row on one worker, though it survives each: its device or its process may be
# sick, and a rebuild is cheap beside a night of quarantined samples.
SICK_AFTER = 3

# A worker that dies idle after this long was not killed by what it had loaded: its node has gone, or its process was
# ended by somebody.
STEADY_AFTER_S = 300.0

MAX_BACKOFF_S = 60.0  # a slot that keeps failing tries again at most this late

# Before a node goes: the last step checkpoint is asked for early enough for one more step (7 s on eight GPUs at 720p)
# and the upload of 30 MB, and the worker is ended while its node can still be told to.
LAST_CHECKPOINT_S = 30.0
GIVE_UP_S = 5.0


class Status(Enum):
    ABSENT = "absent"  # not started, or lost and waiting for its next life
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    ABANDONED = "abandoned"  # lost too often in a row


@dataclass(slots=True)
class WorkerSlot:
    """Changes only by these methods, so that status, task and blame stay consistent."""

    id: WorkerId
    size_class: int = 0  # of its stage, for all its lives
    status: Status = Status.ABSENT
    placed: bool = False  # holds its resources, loaded or not
    asked_at: float = 0.0  # of the start
    ready_at: float = math.inf
    leaving_at: float | None = None  # its node is taken away then
    checkpoint_at: float = math.inf  # when what a leaving worker has done so far is to be written down
    task: tuple[str, ...] = ()
    begun: float = 0.0  # the task
    beat: float = 0.0
    next_within_s: float = math.inf  # how long it may be silent after that, as it says itself
    is_fresh: bool = True  # this life has done no task yet
    losses: int = 0  # in a row, each sample counted once
    start_at: float = 0.0
    blamed: set[str] = field(default_factory=set)  # samples that a loss in a row was counted for
    suspicious: set[str] = field(default_factory=set)  # samples that failed in a row without a loss

    @property
    def alive(self) -> bool:
        return self.status is not Status.ABSENT and self.status is not Status.ABANDONED

    @property
    def ready(self) -> bool:
        return self.status in (Status.IDLE, Status.BUSY)

    @property
    def sick(self) -> bool:
        return len(self.suspicious) >= SICK_AFTER

    def start(self, now: float) -> None:
        self.status, self.asked_at = Status.STARTING, now

    def become_ready(self, now: float) -> None:
        self.status, self.placed, self.ready_at = Status.IDLE, True, now

    def run(self, keys: tuple[str, ...], now: float) -> None:
        self.task, self.status, self.begun = keys, Status.BUSY, now
        self.hear(math.inf, now)

    def hear(self, next_within_s: float, now: float) -> None:
        """Its task made progress, and will again within this time."""
        self.beat, self.next_within_s = now, next_within_s

    def succeed(self) -> tuple[str, ...]:
        self.losses, self.is_fresh = 0, False
        self.blamed.clear()
        self.suspicious.clear()
        return self.release()

    def release(self) -> tuple[str, ...]:
        """End the task, whatever came of it; its keys."""
        keys, self.task, self.status = self.task, (), Status.IDLE
        return keys

    def end(self) -> None:
        """End this life; whether and when the next one begins is not decided by this."""
        self.status, self.placed, self.ready_at = Status.ABSENT, False, math.inf
        self.leaving_at, self.checkpoint_at, self.is_fresh = None, math.inf, True
        self.suspicious.clear()
        self.id = WorkerId(self.id.stage, self.id.slot, self.id.incarnation + 1)

    def lose(self, failure: Failure, now: float, max_losses: int, *, counts: bool = True) -> tuple[str, ...]:
        """End this life for a fault; the keys of the task that ends with it.

        A loss that does not count (`counts`) is free. So of the losses that it takes to exclude a node one does, and a run in
        which no node is right ends all the same.
        """
        # A start that fails has no sample to blame, so each counts; who has stood ready for long has started well.
        is_start = now - self.ready_at < STEADY_AFTER_S
        keys = self.release()
        self.end()
        # A lost batch counts for nobody: its members are tried again alone.
        is_new = is_start if not keys else len(keys) == 1 and keys[0] not in self.blamed
        if failure.kind is FailureClass.INFRA and is_new and counts:
            self.losses += 1
            self.blamed.update(keys)
        if self.losses >= max_losses:
            self.status = Status.ABANDONED
        delay = min(MAX_BACKOFF_S, 2.0 ** (self.losses - 2)) if self.losses > 1 else 0.0
        self.start_at = now + delay
        return keys

    def leave(self, until_s: float, now: float) -> None:
        """Its node is taken away at `until_s`, perhaps another time than was said before."""
        if self.leaving_at is None:
            self.checkpoint_at = now
        self.leaving_at = until_s

    def must_go(self, now: float) -> bool:
        """Whether it leaves, and has nothing to finish or no time for it."""
        return self.leaving_at is not None and (not self.task or now >= self.leaving_at - GIVE_UP_S)

    def owes_checkpoint(self, now: float) -> bool:
        """Whether a checkpoint is due: once when it is known to leave and once near the end."""
        if self.leaving_at is None or now < self.checkpoint_at:
            return False
        last = self.leaving_at - LAST_CHECKPOINT_S
        self.checkpoint_at = last if now < last else math.inf
        return True

    def suspect(self, keys: tuple[str, ...], failure: Failure) -> None:
        """Remember a failure that the worker survived."""
        if len(keys) == 1 and failure.kind is not FailureClass.OUTAGE:
            self.suspicious.update(keys)
