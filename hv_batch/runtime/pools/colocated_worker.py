"""Encoders that use the GPUs of denoise groups (see `rank_gpus` of `ResolvedRun`).

A colocated encoder starts in the placement group of a running denoise group and stays while the ranks are rebuilt. If
the placement group is released, the encoder finishes its task and stops, and no failure is charged. No encoder starts
while the ranks are absent, because Ray could give it the GPU share that a rank needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import ray

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import Event, WorkerId, WorkerLeaving, WorkerLost, WorkerPlaced
from hv_batch.job.stages import Stage
from hv_batch.runtime.groups.reservation import BundleSlot
from hv_batch.runtime.groups.reservation_pool import ReservationPool
from hv_batch.runtime.pools.pool_worker import EncoderWorker
from hv_batch.runtime.worker import InFlight, Watch


class ColocatedWorker:
    """One life of an encoder; `begin` starts its actor as soon as a group has room for it."""

    def __init__(
        self, worker: WorkerId, pool: ReservationPool, watch: Watch, begin: Callable[[BundleSlot, Watch], EncoderWorker]
    ) -> None:
        self.id = worker
        self.nodes: frozenset[str] = frozenset()
        self._pool = pool
        self._watch = watch
        self._begin = begin
        self._room: BundleSlot | None = None
        self._life: EncoderWorker | None = None
        self._move_in()

    def run(self, items: Sequence[InFlight], stage: Stage) -> None:
        assert self._life, f"{self.id} has no room"
        self._life.run(items, stage)

    def poll(self, now: float) -> list[Event]:
        if self._life is None or self._room is None:
            self._move_in()
            return []
        if self._room.reservation.given_back:
            return [WorkerLeaving(self.id, math.inf)]
        if not self.nodes and not self._room.reservation.occupied:
            return [self._turned_out()]
        return self._life.poll(now)

    def kill(self, *, rebuild: bool = False) -> None:
        if self._life and self._room:
            self._life.kill(rebuild=rebuild)
            self._room.leave()

    def _move_in(self) -> None:
        self._room = self._pool.find_room()
        if self._room:
            self._life = self._begin(self._room, self._listen)

    def _listen(self, ref: ray.ObjectRef, then: Callable[[ray.ObjectRef], list[Event]]) -> None:
        self._watch(ref, lambda ref: [self._judge(event) for event in then(ref)])

    def _judge(self, event: Event) -> Event:
        assert self._life
        assert self._room
        reservation = self._room.reservation
        match event:
            case WorkerPlaced() if not reservation.occupied:
                return self._turned_out()
            case WorkerPlaced():
                self.nodes = self._life.nodes
            case WorkerLost() if reservation.given_back:
                return self._turned_out()
        return event

    def _turned_out(self) -> WorkerLost:
        message = "the group on whose GPUs it stood is gone"
        return WorkerLost(self.id, Failure(FailureClass.PREEMPTED, message, where=str(self.id)))
