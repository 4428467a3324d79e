"""Watches all workers for two events that only time brings: an overdue heartbeat, and the end of a draining node."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.workers.worker_slots import Status, WorkerSlot
from hv_batch.job.stages import Stage

Slot = tuple[Stage, int]  # stage and slot of a worker, without its incarnation

ROUNDING_S = 0.001  # of the sum in the heap, which only selects the slots that are checked


class TaskWatch:
    """Call `note` after each change of a slot."""

    def __init__(self, limits: Mapping[Stage, StageLimits]) -> None:
        self._timeouts = {stage: limits[stage].task_timeout_s for stage in limits}
        self._heap: list[tuple[float, Slot]] = []  # when the heartbeat of a slot must be checked
        self._check_at: dict[Slot, float] = {}  # the earliest check of each slot in the heap
        self._busy: dict[Slot, WorkerSlot] = {}
        self._leaving: dict[Slot, WorkerSlot] = {}

    def note(self, slot: WorkerSlot) -> None:
        name = slot.id.stage, slot.id.slot
        if slot.status is Status.BUSY:
            self._busy[name] = slot
            self._schedule(slot)
        else:
            self._busy.pop(name, None)
        if slot.leaving_at is not None:
            self._leaving[name] = slot
        else:
            self._leaving.pop(name, None)

    def limit_s(self, slot: WorkerSlot) -> float:
        """Seconds after its last heartbeat at which the task of a slot counts as hung."""
        return min(self._timeouts[slot.id.stage], slot.next_within_s)

    def hung(self, now: float) -> list[WorkerSlot]:
        """The slots whose task counts as hung, in the order of stages and slots. The caller must end these tasks."""
        found: list[WorkerSlot] = []
        early: list[WorkerSlot] = []
        while self._heap and self._heap[0][0] <= now + ROUNDING_S:
            at, name = heapq.heappop(self._heap)
            if self._check_at.get(name) != at:
                continue  # an earlier check has replaced this one
            del self._check_at[name]
            if (slot := self._busy.get(name)) is None:
                continue
            is_hung = now - slot.last_heartbeat_at > self.limit_s(slot)
            (found if is_hung else early).append(slot)
        for slot in early:
            self._schedule(slot)
        return sorted(found, key=lambda slot: slot.id)

    def leaving(self) -> list[WorkerSlot]:
        """The slots whose workers are on draining nodes, in the order of stages and slots."""
        return [self._leaving[name] for name in sorted(self._leaving)]

    def _schedule(self, slot: WorkerSlot) -> None:
        name = slot.id.stage, slot.id.slot
        at = slot.last_heartbeat_at + self.limit_s(slot)
        if at < self._check_at.get(name, math.inf):
            self._check_at[name] = at
            heapq.heappush(self._heap, (at, name))
