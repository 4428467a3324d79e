"""One worker slot of a station: its lives, its task, and what speaks against it.

A failure may be the sample's fault or the worker's. A slot counts each sample once, however often it is tried there, so
that one sample which kills every worker it meets cannot use up a healthy slot; different samples failing in a row can.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hv_batch.job.errors import Failure, FailureClass
from hv_batch.job.events import WorkerId

# Three different samples that fail in a row on one worker, though it survives each: its device or its process may be
# sick, and a rebuild is cheap beside a night of quarantined samples.
SICK_AFTER = 3

MAX_BACKOFF_S = 60.0  # a slot that keeps failing tries again at most this late


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
    status: Status = Status.ABSENT
    placed: bool = False
    task: tuple[str, ...] = ()
    beat: float = 0.0
    losses: int = 0  # in a row, each sample counted once
    start_at: float = 0.0
    blamed: set[str] = field(default_factory=set)  # samples that a loss in a row was counted for
    suspicious: set[str] = field(default_factory=set)  # samples that failed in a row without a loss

    @property
    def alive(self) -> bool:
        return self.status in (Status.STARTING, Status.IDLE, Status.BUSY)

    @property
    def ready(self) -> bool:
        return self.status in (Status.IDLE, Status.BUSY)

    @property
    def sick(self) -> bool:
        return len(self.suspicious) >= SICK_AFTER

    def start(self) -> None:
        self.status, self.placed = Status.STARTING, False

    def run(self, keys: tuple[str, ...], now: float) -> None:
        self.task, self.status, self.beat = keys, Status.BUSY, now

    def succeed(self) -> tuple[str, ...]:
        self.losses = 0
        self.blamed.clear()
        self.suspicious.clear()
        return self.release()

    def release(self) -> tuple[str, ...]:
        """End the task, whatever came of it; its keys."""
        keys, self.task, self.status = self.task, (), Status.IDLE
        return keys

    def lose(self, failure: Failure, now: float, max_losses: int) -> tuple[str, ...]:
        """End this life; the keys of the task that ends with it."""
        keys = self.release()
        self.suspicious.clear()
        # A start that fails has no sample to blame, so each counts. A lost batch counts for nobody: its members are
        # tried again alone.
        is_new = not keys or (len(keys) == 1 and keys[0] not in self.blamed)
        if failure.kind is FailureClass.INFRA and is_new:
            self.losses += 1
            self.blamed.update(keys)
        self.status = Status.ABANDONED if self.losses >= max_losses else Status.ABSENT
        delay = min(MAX_BACKOFF_S, 2.0 ** (self.losses - 2)) if self.losses > 1 else 0.0
        self.start_at = now + delay
        self.id = WorkerId(self.id.stage, self.id.slot, self.id.life + 1)
        return keys

    def suspect(self, keys: tuple[str, ...], failure: Failure) -> None:
        """Remember a failure that the worker survived."""
        if len(keys) == 1 and failure.kind is not FailureClass.OUTAGE:
            self.suspicious.update(keys)
