"""The driver's side of the pool actors: starts an actor, sends it tasks, polls its progress, and ends it.

A worker never blocks. It registers each Ray reference with `watch`; when the reference is ready, the driver calls the
callback, which returns events for the scheduler.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from hv_batch.job.config.sections import DecodersConfig, EncodersConfig
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import (
    Event,
    TaskDone,
    TaskFailed,
    WorkerId,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from hv_batch.job.stages import Stage
from hv_batch.runtime.classify import classify, is_device_fault, is_node_fault, worker_survives
from hv_batch.runtime.groups.reservation import BundleSlot
from hv_batch.runtime.nodes.exclusion import NodeExclusion
from hv_batch.runtime.nodes.resources import avoid_nodes
from hv_batch.runtime.pools.decoder_actor import DecoderActor, DecodeTask
from hv_batch.runtime.pools.encoder_actor import EncoderActor, EncodeTask
from hv_batch.runtime.run_context import RunContext
from hv_batch.runtime.worker import HIDE_GPUS, HeartbeatPoller, InFlight, Watch, decoded, start_failure

Place = Callable[[frozenset[str]], Any]

logger = logging.getLogger(__name__)


class PoolWorker:
    """One encoder or decoder actor. Subclasses implement `run`. `place(avoid)` creates the actor off those nodes."""

    def __init__(
        self, worker: WorkerId, place: Place, watch: Watch, start_timeout_s: float, exclusion: NodeExclusion
    ) -> None:
        self.id = worker
        self.nodes: frozenset[str] = frozenset()
        self._place = place
        self._watch = watch
        self._exclusion = exclusion
        self.is_ready = False
        self._start_timeout_s = start_timeout_s
        self._deadline = math.inf  # of the start, set once the actor is placed: waiting for resources is no failure
        self._create_actor()

    def poll(self, now: float) -> list[Event]:
        if self.is_ready:
            self._heartbeat.ask()
        elif not self.nodes and self._avoid != self._exclusion.avoided(self.id.stage):
            ray.kill(self._actor, no_restart=True)
            self._create_actor()
        elif now > self._deadline:
            message = "the worker did not load within timeouts.start_s"
            counts = not self._exclusion.start_failed(self.id.stage, self.nodes, message)
            return [WorkerLost(self.id, Failure(FailureClass.INFRA, message, where=str(self.id)), counts)]
        return []

    def kill(self, *, rebuild: bool = False) -> None:
        ray.kill(self._actor, no_restart=True)

    def _create_actor(self) -> None:
        self._avoid = self._exclusion.avoided(self.id.stage)
        self._actor = actor = self._place(self._avoid)
        self._heartbeat = HeartbeatPoller(self.id, actor, self._watch)
        self._watch(actor.node_id.remote(), lambda ref: self._placed(ref) if actor is self._actor else [])
        self._watch(actor.load.remote(), lambda ref: self._loaded(ref) if actor is self._actor else [])

    def _placed(self, ref: ray.ObjectRef) -> list[Event]:
        try:
            self.nodes = frozenset([ray.get(ref)])
        except RayError:  # `load` fails with the same error, and `_loaded` handles it
            return []
        self._deadline = time.monotonic() + self._start_timeout_s
        return [WorkerPlaced(self.id)]

    def _loaded(self, ref: ray.ObjectRef) -> list[Event]:
        try:
            warning = ray.get(ref)
        except RayError as error:
            failure, counts = classify(error, str(self.id)), True
            if failure.kind not in (FailureClass.PREEMPTED, FailureClass.OUTAGE):
                counts = not self._exclusion.start_failed(self.id.stage, self.nodes, failure.message)
            return [WorkerLost(self.id, start_failure(failure), counts)]
        if warning:
            logger.warning(warning, extra={"worker": str(self.id)})
        self.is_ready = True
        self._exclusion.started(self.id.stage, self.nodes)
        return [WorkerReady(self.id)]

    def _done(self, result_bytes: tuple[int, ...] = ()) -> list[Event]:
        self._exclusion.worked(self.id.stage, self.nodes)
        return [TaskDone(self.id, result_bytes)]

    def _failed(self, error: RayError) -> list[Event]:
        failure, counts = classify(error, str(self.id)), True
        if is_device_fault(error):
            counts = not self._exclusion.device_faulted(self.id.stage, self.nodes, failure.message)
        if is_node_fault(error):  # another actor starts, if possible on another node; at its start it checks its node
            counts = not self._exclusion.tool_failed(self.id.stage, self.nodes, failure.message)
            return [WorkerLost(self.id, failure, counts)]
        return [TaskFailed(self.id, failure) if worker_survives(error) else WorkerLost(self.id, failure, counts)]


class EncoderWorker(PoolWorker):
    def run(self, items: Sequence[InFlight], _stage: Stage) -> None:
        call = self._actor.encode.options(num_returns=len(items) + 1)
        *embeddings, reports = call.remote(
            [EncodeTask(item.sample.key, item.attempt, item.sample.params) for item in items]
        )
        self._watch(reports, lambda ref: self._encoded(ref, items, embeddings))

    def _encoded(
        self, ref: ray.ObjectRef, items: Sequence[InFlight], embeddings: Sequence[ray.ObjectRef]
    ) -> list[Event]:
        try:
            reports = ray.get(ref)
        except RayError as error:
            return self._failed(error)
        for item, embedding, report in zip(items, embeddings, reports, strict=True):
            item.embeddings, item.stages = embedding, {"encode": report}
        return self._done(tuple(report.result_bytes for report in reports))


class DecoderWorker(PoolWorker):
    def run(self, items: Sequence[InFlight], _stage: Stage) -> None:
        tasks = [DecodeTask(item.sample, item.stages, item.history) for item in items]
        ref = self._actor.decode.remote(tasks, *(item.latents for item in items))
        self._watch(ref, lambda ref: self._decoded(ref, items))

    def _decoded(self, ref: ray.ObjectRef, items: Sequence[InFlight]) -> list[Event]:
        try:
            reports = ray.get(ref)
        except RayError as error:
            if not isinstance(error, RayTaskError) or isinstance(error.cause, RayError):
                for item in items:
                    item.latents = None  # the lost object may be this one; the next try reads the output root
            return self._failed(error)
        self._exclusion.worked(self.id.stage, self.nodes)
        return [decoded(self.id, items, reports)]


def start_encoder(
    worker: WorkerId, context: RunContext, watch: Watch, exclusion: NodeExclusion, room: BundleSlot | None = None
) -> EncoderWorker:
    place = partial(_place, EncoderActor, worker, context, context.config.encoders, room)
    return EncoderWorker(worker, place, watch, context.config.timeouts.start_s, exclusion)


def start_decoder(worker: WorkerId, context: RunContext, watch: Watch, exclusion: NodeExclusion) -> DecoderWorker:
    place = partial(_place, DecoderActor, worker, context, context.config.decoders, None)
    return DecoderWorker(worker, place, watch, context.config.timeouts.start_s, exclusion)


def _place(
    actor_class: Any,
    worker: WorkerId,
    context: RunContext,
    pool: EncodersConfig | DecodersConfig,
    room: BundleSlot | None,
    avoid: frozenset[str],
) -> Any:
    """Create an actor in the bundle `room` of a group's reservation, or else on any node that is not in `avoid`."""
    return actor_class.options(
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        label_selector={} if room else avoid_nodes(avoid),
        scheduling_strategy=room.strategy if room else "DEFAULT",
        runtime_env=HIDE_GPUS if pool.gpus == 0 else {},
    ).remote(context, str(worker))
