"""The driver loop: hears Ray, tells the scheduler, carries out its actions. It holds references, never payloads.

One thread, one queue of events. Everything that takes long (encoding, rendering, uploading, sealing) happens in an
actor or task, and its reference is watched until it is there.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray

from hv_batch.job.failure import Failure
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.progress import ProgressLog, Snapshot
from hv_batch.job.records.pending import PendingSamples, ShardSkipped, StorageDown, StorageUp
from hv_batch.job.redaction import public_url
from hv_batch.job.scheduling.capacity import retry_limits
from hv_batch.job.scheduling.limits import OUTAGE_PAUSE_S
from hv_batch.job.scheduling.messages import (
    Abort,
    Action,
    Admit,
    Admitted,
    Checkpoint,
    Event,
    Finish,
    KillWorker,
    PlanExhausted,
    Published,
    Quarantine,
    ReleaseWorker,
    Resized,
    Run,
    Spooled,
    StartWorker,
    StopRequested,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerId,
    WorkerReady,
)
from hv_batch.job.scheduling.scheduler import Scheduler
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload
from hv_batch.protocol import UserError
from hv_batch.runtime.driver.background_tasks import BackgroundTasks
from hv_batch.runtime.driver.group_losses import Losses
from hv_batch.runtime.driver.metrics import RunMetrics
from hv_batch.runtime.driver.outage import Outage
from hv_batch.runtime.driver.spool_drain import SpoolDrain
from hv_batch.runtime.groups.denoise_group import DenoiseGroup
from hv_batch.runtime.groups.reservation_pool import ReservationPool
from hv_batch.runtime.nodes.exclusion import NodeExclusion
from hv_batch.runtime.nodes.node_watch import NodeWatch
from hv_batch.runtime.nodes.pending_actors import PendingActorWatch
from hv_batch.runtime.nodes.resources import ResourceShortage, alive_nodes, result_shares
from hv_batch.runtime.pools.colocated_worker import ColocatedWorker
from hv_batch.runtime.pools.pool_worker import start_decoder, start_encoder
from hv_batch.runtime.run_context import RunContext
from hv_batch.runtime.worker import InFlight, Worker

logger = logging.getLogger(__name__)

TICK_S = 0.5  # how long the loop may sleep: the grain of timeouts, signals and progress
POLL_S = 1.0  # how often a worker is asked for its progress


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    drained: bool  # a stop cut it short
    seconds: float
    excluded_nodes: Mapping[str, str]  # that got no group any more, each with the reason
    losses: Losses


@dataclass(frozen=True, slots=True)
class Task:
    keys: tuple[str, ...]
    stage: Stage
    begun: float


class Driver:
    """Renders what `plan` has left. `should_stop` is asked on every turn of the loop."""

    def __init__(
        self,
        context: RunContext,
        plan: PendingSamples,
        total: int,
        extra_kinds: Mapping[str, ColumnType],
        shortage: ResourceShortage,
        should_stop: Callable[[], bool],
    ) -> None:
        self._context = context
        self._plan = plan
        self._pending = iter(plan)
        self._total = total
        self._progress = ProgressLog()
        self._shortage = shortage
        self._should_stop = should_stop
        config, run = context.config, context.run
        limits = run.stage_limits(result_shares(run))
        self._scheduler = Scheduler(limits, retry_limits(config), config.timeouts.drain_s)
        self._exclusion = NodeExclusion(run)
        self._groups = ReservationPool(run, self._exclusion)
        self._rooms = PendingActorWatch(run)
        self._nodes = NodeWatch(limits[Stage.DENOISE].workers)
        self._metrics = RunMetrics(public_url(context.store.url))
        self._losses = Losses(on_gpus=config.parallel.device == "cuda")
        self._items: dict[str, InFlight] = {}
        self._workers: dict[WorkerId, Worker] = {}
        self._tasks: dict[WorkerId, Task] = {}
        self._stood: set[WorkerId] = set()  # groups that have started and not ended
        self._watched: dict[ray.ObjectRef, Callable[[ray.ObjectRef], list[Event]]] = {}
        self._events: deque[Event] = deque()
        self._to_admit = 0
        self._outage = Outage()
        self._background_tasks = BackgroundTasks(context, plan, extra_kinds, self._outage, self._watch)
        self._spool_drain = SpoolDrain(
            context, self._watch, self._outage, self._background_tasks.add, self._events.append
        )
        self._look_at = 0.0  # the plan, which asks the output root, is not asked for samples before
        self._polled = 0.0
        self._ticked = 0.0
        self._stop_said = False
        self._end: Finish | None = None

    def commit_spooled(self) -> None:
        """Begin with what an earlier life of this run has left on the disks of the cluster's nodes."""
        self._spool_drain.visit(alive_nodes())

    def run(self) -> Outcome:
        """Raises UserError when the run cannot go on. However it ends, its actors and placement groups are gone."""
        begun = time.monotonic()
        try:
            self._carry_out(self._scheduler.begin())
            self._work_off()
            # A stop does not wait for what is owed: the next run finds the shard complete and seals it, and tries a
            # sample again that should have been quarantined.
            while self._end is None or (
                self._background_tasks.has_pending and not self._end.drained and not self._stop_said
            ):
                self._listen()
                self._work_off()
                self._spool_drain.go_on(time.monotonic())
                self._show()
            drained = self._end.drained or self._background_tasks.has_pending
            return Outcome(drained, time.monotonic() - begun, self._exclusion.reasons(), self._losses)
        finally:
            for worker in list(self._workers.values()):
                worker.kill()
            self._groups.close()
            self._shortage.forget()
            if waiting := self._spool_drain.describe():
                logger.warning(waiting)

    # Hearing ----------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Wait for news at most one tick, and queue it."""
        may_admit = self._may_admit()
        if self._watched:
            patience = 0 if may_admit else TICK_S
            first, _ = ray.wait(list(self._watched), num_returns=1, timeout=patience, fetch_local=False)
            if first:  # whatever else has come in meanwhile is taken in the same turn
                ready, _ = ray.wait(list(self._watched), num_returns=len(self._watched), timeout=0, fetch_local=False)
                for ref in ready:
                    self._events.extend(self._watched.pop(ref)(ref))
        elif not may_admit:
            time.sleep(TICK_S)
        if self._should_stop() and not self._stop_said:
            self._stop_said = True
            logger.info(
                f"stop requested: finishing what is running, at most {self._context.config.timeouts.drain_s:g} s"
            )
            self._events.append(StopRequested())
        now = time.monotonic()
        if now - self._polled >= POLL_S:
            self._polled = now
            for worker in list(self._workers.values()):
                self._events.extend(worker.poll(now))
            to_come = zip(self._context.run.groups.plans, self._scheduler.groups_to_come(now), strict=True)
            self._groups.give_back(dict(to_come), now)
            self._rooms.look(self._workers, now)
            if self._end is None:
                self._shortage.lasts(now, is_busy=bool(self._tasks))
        self._events.extend(self._nodes.look(self._workers, now))
        self._admit()
        if not self._events or now - self._ticked >= TICK_S:  # each looks at every worker, and time passes slowly
            self._ticked = now
            self._events.append(Tick())

    def _watch(self, ref: ray.ObjectRef, then: Callable[[ray.ObjectRef], list[Event]]) -> None:
        self._watched[ref] = then

    def _work_off(self) -> None:
        while self._events:
            event = self._events.popleft()
            self._note(event)
            self._carry_out(self._scheduler.step(event, time.monotonic()))
        self._background_tasks.run()

    def _note(self, event: Event) -> None:
        """Keep the driver's own books and tell people what they would want to know."""
        match event:
            case WorkerReady(worker) if worker.stage is Stage.DENOISE and worker in self._workers:
                self._stood.add(worker)
            case TaskDone(worker) if worker in self._workers:
                task = self._tasks.pop(worker)
                self._metrics.task_done(task.stage, time.monotonic() - task.begun)
                if task.stage is Stage.DECODE:
                    self._outage.over(time.monotonic())
                    for key in task.keys:
                        self._plan.committed(self._items.pop(key).sample)
            case Spooled(worker, node, spooled) if worker in self._workers:
                task = self._tasks.pop(worker)
                self._metrics.task_done(task.stage, time.monotonic() - task.begun)
                for key in task.keys:
                    if key in spooled:
                        self._items[key].latents = None  # makes room in the object store
                        self._spool_drain.add(node, self._items[key].sample)
                    else:
                        self._plan.committed(self._items.pop(key).sample)
            case Published(key):
                self._plan.committed(self._items.pop(key).sample)
            case TaskFailed(worker, failure) if worker in self._workers:
                self._log_failure(worker, self._tasks.pop(worker, None), failure)

    def _lose(self, worker: WorkerId, failure: Failure) -> None:
        task = self._tasks.pop(worker, None)
        if worker in self._stood:  # a start that failed has lost nothing
            self._stood.discard(worker)
            seconds = time.monotonic() - task.begun if task else 0.0
            self._losses.add(failure.kind, seconds, self._group(worker).plan.world_size)
            self._metrics.group_lost(failure.kind, seconds)
        self._log_failure(worker, task, failure)

    def _log_failure(self, worker: WorkerId, task: Task | None, failure: Failure) -> None:
        about = f" with {', '.join(task.keys)}" if task else ""
        keys = task.keys if task else ()
        fields: dict[str, object] = {"worker": str(worker)}
        if keys:
            fields |= {"sample": ",".join(keys), "attempt": self._items[keys[0]].attempt}
        logger.warning(f"{worker}{about}: {failure.kind.value}: {failure.first_line}", extra=fields)

    # Acting -----------------------------------------------------------------------------------------------------------

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Admit(count):
                    self._to_admit += count
                case StartWorker(worker, size_class):
                    self._workers[worker] = self._start(worker, size_class)
                case KillWorker(worker, failure, rebuild):
                    self._lose(worker, failure)
                    self._workers.pop(worker).kill(rebuild=rebuild)
                case ReleaseWorker(worker, reason):
                    self._stood.discard(worker)
                    logger.info(f"{worker} is released: {reason}")
                    self._workers.pop(worker).kill()
                case Resized():
                    logger.info(action.reason)
                case Run(worker, keys, stage):
                    self._tasks[worker] = Task(keys, stage, time.monotonic())
                    self._run(worker, keys, stage)
                case Checkpoint(worker):
                    self._group(worker).checkpoint()
                case Quarantine(key, failures):
                    item = self._items.pop(key)
                    self._background_tasks.quarantine(item.sample, (*item.earlier, *failures))
                case Abort(failure):
                    if failure.traceback:
                        logger.error(failure.traceback)
                    raise UserError(
                        f"The run cannot go on: {failure.message.rstrip('. ')}. What is committed stays; mend this and "
                        "run the same command again to render the rest."
                    )
                case Finish():
                    self._end = action

    def _may_admit(self) -> bool:
        return self._to_admit > 0 and time.monotonic() >= self._look_at and not self._spool_drain.is_visiting

    def _admit(self) -> None:
        """Feed samples from the plan, but look up at most one finished shard a turn: a resume has thousands."""
        while self._may_admit():
            found = next(self._pending, None)
            if found is None:
                self._to_admit = 0
                self._events.append(PlanExhausted())
            elif isinstance(found, StorageDown):
                self._look_at = time.monotonic() + OUTAGE_PAUSE_S
                self._outage.met(found.error, time.monotonic())
            elif isinstance(found, StorageUp):
                self._outage.over(time.monotonic())
            elif isinstance(found, ShardSkipped):
                return
            else:
                self._to_admit -= 1
                params, size_class = found.sample.params, self._context.run.groups.size_class(found.sample.params.shape)
                item = InFlight(found.sample, earlier=found.earlier, has_steps=found.has_steps)
                self._items[found.sample.key] = item
                work = Workload.of(params)
                self._events.append(Admitted(found.sample.key, found.stage, params.latent_bytes, size_class, work))

    def _start(self, worker: WorkerId, size_class: int) -> Worker:
        if worker.stage is Stage.DENOISE:
            plan = self._context.run.groups.plans[size_class]
            return DenoiseGroup(worker, plan, self._context, self._watch, self._groups, self._exclusion)
        if worker.stage is Stage.DECODE:
            return start_decoder(worker, self._context, self._watch, self._exclusion)
        if not self._context.config.encoders.is_colocated:
            return start_encoder(worker, self._context, self._watch, self._exclusion)
        return ColocatedWorker(
            worker,
            self._groups,
            self._watch,
            lambda room, watch: start_encoder(worker, self._context, watch, self._exclusion, room),
        )

    def _group(self, worker: WorkerId) -> DenoiseGroup:
        group = self._workers[worker]
        assert isinstance(group, DenoiseGroup), f"{worker} is no group"
        return group

    def _run(self, worker: WorkerId, keys: tuple[str, ...], stage: Stage) -> None:
        items = [self._items[key] for key in keys]
        for item in items:
            item.failures = self._scheduler.failures(item.sample.key)
        self._workers[worker].run(items, stage)

    def _show(self) -> None:
        at, counts = self._scheduler.at, self._plan.counts
        snapshot = Snapshot(
            total=self._total,
            committed=counts.committed_before + counts.committed,
            quarantined=counts.quarantined_before + counts.quarantined,
            done_before=counts.committed_before + counts.quarantined_before,
            starting=self._scheduler.starting(),
            encoding=at(Stage.ENCODE),
            denoising=at(Stage.DENOISE),
            decoding=at(Stage.DECODE),
            spooled=self._scheduler.spooled(),
        )
        self._progress.log(snapshot)
        self._metrics.show(snapshot)
