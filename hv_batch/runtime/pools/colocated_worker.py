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
    """One incarnation of an encoder; `begin` starts its actor as soon as a group has a slot for it."""

    def __init__(
        self, worker: WorkerId, pool: ReservationPool, watch: Watch, begin: Callable[[BundleSlot, Watch], EncoderWorker]
    ) -> None:
        self.id = worker
        self.nodes: frozenset[str] = frozenset()
        self._pool = pool
        self._watch = watch
        self._begin = begin
        self._slot: BundleSlot | None = None
        self._encoder: EncoderWorker | None = None
        self._take_slot()

    @property
    def is_ready(self) -> bool:
        return self._encoder is not None and self._encoder.is_ready

    def run(self, items: Sequence[InFlight], stage: Stage) -> None:
        assert self._encoder, f"{self.id} has no slot"
        self._encoder.run(items, stage)

    def poll(self, now: float) -> list[Event]:
        if self._encoder is None or self._slot is None:
            self._take_slot()
            return []
        if self._slot.reservation.is_released:
            return [WorkerLeaving(self.id, math.inf)]
        if not self.nodes and not self._slot.reservation.is_occupied:
            return [self._group_gone()]
        return self._encoder.poll(now)

    def kill(self, *, rebuild: bool = False) -> None:
        if self._encoder and self._slot:
            self._encoder.kill(rebuild=rebuild)
            self._slot.leave()

    def _take_slot(self) -> None:
        self._slot = self._pool.find_slot()
        if self._slot:
            self._encoder = self._begin(self._slot, self._watch_encoder)

    def _watch_encoder(self, ref: ray.ObjectRef, then: Callable[[ray.ObjectRef], list[Event]]) -> None:
        self._watch(ref, lambda ref: [self._translate(event) for event in then(ref)])

    def _translate(self, event: Event) -> Event:
        """An event of the encoder, or what it means if its group is gone."""
        assert self._encoder
        assert self._slot
        reservation = self._slot.reservation
        match event:
            case WorkerPlaced() if not reservation.is_occupied:
                return self._group_gone()
            case WorkerPlaced():
                self.nodes = self._encoder.nodes
            case WorkerLost() if reservation.is_released:
                return self._group_gone()
        return event

    def _group_gone(self) -> WorkerLost:
        message = "the group whose GPUs it uses is gone"
        return WorkerLost(self.id, Failure(FailureClass.PREEMPTED, message, where=str(self.id)))
