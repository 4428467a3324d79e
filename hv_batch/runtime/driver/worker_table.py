"""The workers of a run that exist now, the task of each, and the log lines and metrics of those that are lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import Event, WorkerId
from hv_batch.job.stages import Stage
from hv_batch.runtime.driver.event_recorder import EventRecorder
from hv_batch.runtime.driver.gpu_ledger import GpuLedger, use_of
from hv_batch.runtime.driver.loss_report import Losses
from hv_batch.runtime.driver.metrics import RunMetrics
from hv_batch.runtime.driver.stage_spans import StageSpans
from hv_batch.runtime.groups.denoise_group import DenoiseGroup
from hv_batch.runtime.groups.rank_answers import CallLater
from hv_batch.runtime.groups.reservation_pool import ReservationPool
from hv_batch.runtime.nodes.exclusion import NodeExclusion
from hv_batch.runtime.pools.colocated_worker import ColocatedWorker
from hv_batch.runtime.pools.pool_worker import start_decoder, start_encoder
from hv_batch.runtime.run_context import RunContext
from hv_batch.runtime.worker import InFlight, Watch, Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    items: tuple[InFlight, ...]
    stage: Stage
    begun: float

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(item.sample.key for item in self.items)


class WorkerTable:
    """Starts, polls and ends workers. `watch` and `call_later` are the driver's."""

    def __init__(
        self,
        context: RunContext,
        reservations: ReservationPool,
        exclusion: NodeExclusion,
        metrics: RunMetrics,
        recorder: EventRecorder,
        spans: StageSpans | None,
        watch: Watch,
        call_later: CallLater,
    ) -> None:
        self.gpu_ledger = GpuLedger()
        self.losses = Losses(on_gpus=context.config.parallel.device == "cuda")
        self._context = context
        self._reservations = reservations
        self._exclusion = exclusion
        self._metrics = metrics
        self._recorder = recorder
        self._spans = spans
        self._watch = watch
        self._call_later = call_later
        self._workers: dict[WorkerId, Worker] = {}
        self._tasks: dict[WorkerId, Task] = {}

    @property
    def workers(self) -> Mapping[WorkerId, Worker]:
        return self._workers

    @property
    def is_busy(self) -> bool:
        """Whether any worker has a task."""
        return bool(self._tasks)

    @property
    def reserved_gpus(self) -> float:
        """The GPUs of the workers that are placed. Colocated encoders use those of the groups."""
        return sum(self._gpus(each, worker) for each, worker in self._workers.items() if worker.nodes)

    def start(self, worker: WorkerId, size_class: int) -> None:
        self._workers[worker] = started = self._start(worker, size_class)
        self._recorder.worker_asked(worker, self._gpus(worker, started))

    def placed(self, worker: WorkerId) -> None:
        """`worker` holds its resources and loads."""
        self._recorder.worker_placed(worker, self._workers[worker].nodes)

    def ready(self, worker: WorkerId) -> None:
        """`worker` accepts tasks."""
        self._recorder.worker_ready(worker, self._workers[worker].nodes)

    def poll(self, now: float) -> list[Event]:
        self._metrics.gpus_used(self.gpu_ledger.note(self._gpu_uses(), now))
        return [event for worker in list(self._workers.values()) for event in worker.poll(now)]

    def run(self, worker: WorkerId, items: Sequence[InFlight], stage: Stage) -> None:
        self._tasks[worker] = Task(tuple(items), stage, time.monotonic())
        self._workers[worker].run(items, stage)

    def checkpoint(self, worker: WorkerId) -> None:
        group = self._workers[worker]
        assert isinstance(group, DenoiseGroup), f"{worker} is not a group"
        group.checkpoint()

    def task_done(self, worker: WorkerId) -> Task:
        """The task that `worker` has finished."""
        task = self._tasks.pop(worker)
        self._trace(worker, self._workers[worker], task)
        looks = [item.look for item in task.items if item.look] if task.stage is Stage.DECODE else []
        self._metrics.task_done(task.stage, time.monotonic() - task.begun, looks)
        self._recorder.task_ended(worker, task.begun, len(task.items), failed=False)
        return task

    def task_failed(self, worker: WorkerId, failure: Failure) -> Task | None:
        """The task of `worker`, which failed; the worker goes on."""
        task = self._tasks.pop(worker, None)
        self._note_lost(worker, self._workers[worker], task, failure)
        return task

    def lose(self, worker: WorkerId, failure: Failure, *, rebuild: bool) -> None:
        """Kill a worker because of a failure; the arguments are those of `KillWorker`."""
        task, lost = self._tasks.pop(worker, None), self._workers.pop(worker)
        if isinstance(lost, DenoiseGroup) and lost.is_ready:  # a start that failed has lost nothing
            seconds = time.monotonic() - task.begun if task else 0.0
            self.losses.add(failure.kind, seconds, lost.plan.world_size)
            self._metrics.group_lost(failure.kind, seconds)
        self._note_lost(worker, lost, task, failure)
        self._recorder.worker_lost(worker, failure)
        lost.kill(rebuild=rebuild)

    def release(self, worker: WorkerId, reason: str) -> None:
        """End a worker that is not needed any more."""
        logger.info(f"{worker} is released: {reason}")
        self._recorder.worker_released(worker, reason)
        self._workers.pop(worker).kill()

    def close(self) -> None:
        """Kill all workers."""
        for worker in list(self._workers.values()):
            worker.kill()

    def _gpus(self, worker: WorkerId, own: Worker) -> float:
        """The GPUs that a worker asks for; 0 for colocated encoders."""
        run = self._context.run
        if isinstance(own, DenoiseGroup):
            return own.plan.world_size * run.rank_gpus
        pool = run.pools.get(worker.stage)
        return pool.gpus if pool else 0.0

    def _gpu_uses(self) -> Iterator[tuple[str, float]]:
        for worker, own in self._workers.items():
            task = self._tasks.get(worker)
            if not own.nodes:
                continue
            use = use_of(worker.stage, is_ready=own.is_ready, task=task.stage if task else None)
            yield use, self._gpus(worker, own)

    def _note_lost(self, worker: WorkerId, own: Worker, task: Task | None, failure: Failure) -> None:
        if task:
            self._metrics.task_lost(failure.kind, (time.monotonic() - task.begun) * self._gpus(worker, own))
            self._trace(worker, own, task, failure.kind)
            self._recorder.task_ended(worker, task.begun, len(task.items), failed=True)
        _log_failure(worker, task, failure)

    def _trace(self, worker: WorkerId, own: Worker, task: Task, cause: FailureClass | None = None) -> None:
        if self._spans:
            self._spans.task_ended(worker, own.nodes, task.stage, task.items, task.begun, cause)

    def _start(self, worker: WorkerId, size_class: int) -> Worker:
        context, exclusion = self._context, self._exclusion
        if worker.stage is Stage.DENOISE:
            plan = context.run.groups.plans[size_class]
            return DenoiseGroup(worker, plan, context, self._watch, self._call_later, self._reservations, exclusion)
        if worker.stage is Stage.DECODE:
            return start_decoder(worker, context, self._watch, exclusion)
        if not context.config.encoders.is_colocated:
            return start_encoder(worker, context, self._watch, exclusion)
        return ColocatedWorker(
            worker,
            self._reservations,
            self._watch,
            lambda slot, watch: start_encoder(worker, context, watch, exclusion, slot),
        )


def _log_failure(worker: WorkerId, task: Task | None, failure: Failure) -> None:
    """One record per sample of the task, so that a search for the sample finds it."""
    what = f"{failure.kind.value}: {failure.first_line}"
    if not task:
        logger.warning(f"{worker}: {what}", extra={"worker": str(worker)})
        return
    others = f" (one of {len(task.items)} samples of its task)" if len(task.items) > 1 else ""
    for item in task.items:
        fields = {"worker": str(worker), "sample": item.sample.key, "attempt": item.attempt}
        logger.warning(f"{worker} with {item.sample.key}{others}: {what}", extra=fields)
