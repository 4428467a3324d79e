"""The driver's loop: passes events to the scheduler and carries out the actions that it returns.

One thread, which holds references and never payloads, and never waits for anything but the next event:

- Encoding, rendering, uploading and sealing run in actors and tasks. The loop watches their references.
- Look-ups of shards, records of the driver itself and probes of nodes run in I/O threads (see `io_worker`), whose
  results are calls that the loop makes. Another thread asks Ray for the state of the cluster (see `ClusterView`).
- Whatever is due later is a timer (see `loop_calls`).

All state of the driver, the scheduler and the workers is touched in this thread only.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray

from hv_batch.job.failure import FailureClass
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.progress import ProgressLog, Snapshot
from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.redaction import public_url
from hv_batch.job.scheduling.capacity import retry_limits
from hv_batch.job.scheduling.messages import (
    Abort,
    Action,
    Admit,
    Admitted,
    Checkpoint,
    Event,
    Finish,
    Heartbeat,
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
    WorkerPlaced,
    WorkerReady,
)
from hv_batch.job.scheduling.scheduler import Scheduler
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload
from hv_batch.protocol import UserError
from hv_batch.runtime.driver.background_tasks import BackgroundTasks
from hv_batch.runtime.driver.event_recorder import EventRecorder
from hv_batch.runtime.driver.io_worker import IoWorker
from hv_batch.runtime.driver.loop_calls import LoopCalls
from hv_batch.runtime.driver.loop_timer import LoopTimer
from hv_batch.runtime.driver.loss_report import Losses
from hv_batch.runtime.driver.metrics import RunMetrics
from hv_batch.runtime.driver.outage import Outage
from hv_batch.runtime.driver.report_task import ReportTask
from hv_batch.runtime.driver.shard_lookups import ShardLookups
from hv_batch.runtime.driver.spool_drain import SpoolDrain
from hv_batch.runtime.driver.stage_spans import start_spans
from hv_batch.runtime.driver.worker_table import WorkerTable
from hv_batch.runtime.groups.reservation_pool import ReservationPool
from hv_batch.runtime.nodes.cluster_view import ClusterView
from hv_batch.runtime.nodes.exclusion import NodeExclusion
from hv_batch.runtime.nodes.node_watch import NodeWatch
from hv_batch.runtime.nodes.pending_actors import PendingActorWatch
from hv_batch.runtime.nodes.resources import ResourceShortage, result_shares
from hv_batch.runtime.run_context import RunContext
from hv_batch.runtime.run_limits import GpuMeter
from hv_batch.runtime.worker import InFlight

logger = logging.getLogger(__name__)

TICK_S = 0.5  # the longest wait: the grain of timeouts, signals and progress
POLL_S = 1.0  # how often a worker is asked for its progress
IO_POLL_S = 0.02  # the longest wait while an I/O thread has work, because `ray.wait` does not end for its result

# How long the end of a run waits for the record that is being written. The next run writes the ones that are missing.
CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    drained: bool  # a stop cut it short
    lost: int  # samples that are pending again, because the output root lost their files
    seconds: float
    excluded_nodes: Mapping[str, str]  # with the reason of each
    losses: Losses
    loop_max_s: float  # the longest iteration of the loop while a worker had a task, without its wait for events


class Driver:
    """Renders the samples of `pending`. `should_stop` is called in every iteration of the loop."""

    def __init__(
        self,
        context: RunContext,
        pending: PendingSamples,
        total: int,
        extra_kinds: Mapping[str, ColumnType],
        shortage: ResourceShortage,
        meter: GpuMeter,
        should_stop: Callable[[], bool],
    ) -> None:
        self._context = context
        self._pending = pending
        self._total = total
        self._shortage = shortage
        self._meter = meter
        self._should_stop = should_stop
        config, run = context.config, context.run
        limits = run.stage_limits(result_shares(run))
        self._scheduler = Scheduler(limits, retry_limits(config, total), config.timeouts.drain_s)
        self._items: dict[str, InFlight] = {}
        self._events: deque[Event] = deque()
        self._to_admit = 0
        self._watched: dict[ray.ObjectRef, Callable[[ray.ObjectRef], list[Event]]] = {}
        # A thread each, so that an outage that one meets does not delay the others.
        self._calls, self._outage = LoopCalls(), Outage()
        self._records_io, lookups_io, self._probes_io = (
            IoWorker(name, self._calls, self._outage) for name in ("records", "lookups", "probes")
        )
        self._lookups = ShardLookups(pending, lookups_io)
        self._background_tasks = BackgroundTasks(
            context, pending, extra_kinds, self._outage, self._records_io, self._watch
        )
        self._spool_drain = SpoolDrain(context, self._watch, self._outage, self._records_io.submit)
        self._cluster = ClusterView()
        self._exclusion = NodeExclusion(run, self._cluster)
        self._reservations = ReservationPool(run, self._exclusion, self._cluster, self._probes_io.submit)
        self._metrics = RunMetrics(public_url(context.store.url))
        self._recorder = EventRecorder(
            context.store, self._cluster, self._exclusion.reasons, lambda: self._outage.is_away
        )
        self._spans = start_spans(public_url(context.store.url))
        self._table = WorkerTable(
            *(context, self._reservations, self._exclusion, self._metrics, self._recorder, self._spans),
            *(self._watch, self._calls.call_later),
        )
        self._pending_actors = PendingActorWatch(run, self._cluster)
        self._nodes = NodeWatch(limits[Stage.DENOISE].workers, self._cluster)
        self._report_task = ReportTask(context, self._watch, self._outage)
        self._progress = ProgressLog()
        self._timer = LoopTimer()
        self._polled_at = 0.0
        self._ticked_at = 0.0
        self._stop_requested = False
        self._end: Finish | None = None

    def commit_spooled(self) -> None:
        """Begin with the videos that an earlier run of this output root has left on the disks of the nodes."""
        self._spool_drain.scan_nodes(self._cluster.alive())

    def note_commits(self) -> None:
        """An earlier run has committed samples to this output root; see `StopRule`."""
        self._scheduler.note_commit()

    def run(self) -> Outcome:
        """Raises UserError when the run cannot go on. However it ends, its actors and placement groups are gone."""
        begun = time.monotonic()
        try:
            self._recorder.started(self._snapshot())
            self._carry_out(self._scheduler.begin())
            # A stop does not wait for the background tasks: the next run finds complete shards and seals them, and
            # tries samples again that should have been quarantined.
            while self._end is None or (
                self._background_tasks.has_pending and not self._end.drained and not self._stop_requested
            ):
                has_ready = self._wait()
                with self._timer.iteration(is_busy=self._table.is_busy):
                    self._collect_events(has_ready)
                    self._process_events()
                    self._background_tasks.start_seals()
                    self._spool_drain.poll(time.monotonic())
                    if not self._stop_requested:
                        self._report_task.poll(time.monotonic())
                    self._report()
            self._metrics.ended()
            drained = self._end.drained or self._background_tasks.has_pending
            self._recorder.end("stopped" if drained else "finished")
            return Outcome(
                drained,
                self._background_tasks.lost,
                time.monotonic() - begun,
                self._exclusion.reasons(),
                self._table.losses,
                self._timer.busy_max_s,
            )
        except BaseException as error:
            is_stop = isinstance(error, KeyboardInterrupt)  # a second stop signal
            if is_stop:
                self._metrics.ended()
            self._recorder.end("stopped" if is_stop else "failed", str(error))
            raise
        finally:
            self._report_task.close()
            self._lookups.close()
            self._probes_io.close()
            self._table.close()
            self._reservations.close()
            self._cluster.close()
            self._shortage.forget()
            self._records_io.close(wait_s=CLOSE_S)
            self._recorder.close()
            if waiting := self._spool_drain.describe():
                logger.warning(waiting)
            if self._spans:
                self._spans.close()

    # Events -----------------------------------------------------------------------------------------------------------

    def _wait(self) -> bool:
        """Wait until a watched reference is ready or a call is due, at most one tick; whether a reference is ready."""
        timeout_s = min(TICK_S, self._calls.seconds_to_next(time.monotonic()))
        if self._records_io.is_running or self._probes_io.is_running or self._awaits_lookup():
            timeout_s = min(timeout_s, IO_POLL_S)
        if not self._watched:
            time.sleep(timeout_s)
            return False
        ready, _ = ray.wait(list(self._watched), num_returns=1, timeout=timeout_s, fetch_local=False)
        return bool(ready)

    def _collect_events(self, has_ready: bool) -> None:
        if has_ready:
            ready, _ = ray.wait(list(self._watched), num_returns=len(self._watched), timeout=0, fetch_local=False)
            for ref in ready:
                self._events.extend(self._watched.pop(ref)(ref))
        self._events.extend(self._calls.make_due(time.monotonic()))
        if self._should_stop() and not self._stop_requested:
            self._stop_requested = True
            drain_s = self._context.config.timeouts.drain_s
            logger.info(f"stop requested: finishing what is running, at most {drain_s:g} s")
            self._recorder.drain_started()
            self._events.append(StopRequested())
        now = time.monotonic()
        if now - self._polled_at >= POLL_S:
            self._polled_at = now
            self._poll(now)
        self._events.extend(self._nodes.look(self._table.workers, now))
        self._admit()
        if now - self._ticked_at >= TICK_S:  # each looks at every worker, and time passes slowly
            self._ticked_at = now
            self._events.append(Tick())

    def _poll(self, now: float) -> None:
        self._events.extend(self._table.poll(now))
        self._meter.note(self._table.reserved_gpus, now)
        groups_to_come = zip(self._context.run.groups.plans, self._scheduler.groups_to_come(now), strict=True)
        self._reservations.release_unused(dict(groups_to_come), now)
        self._reservations.grant_deferred()
        self._pending_actors.look(self._table.workers, now)
        if self._end is None:
            self._shortage.lasts(list(self._cluster.alive().values()), now, is_busy=self._table.is_busy)

    def _watch(self, ref: ray.ObjectRef, then: Callable[[ray.ObjectRef], list[Event]]) -> None:
        self._watched[ref] = then

    def _process_events(self) -> None:
        while self._events:
            event = self._events.popleft()
            self._note(event)
            self._carry_out(self._scheduler.step(event, time.monotonic()))

    def _note(self, event: Event) -> None:
        """Keep the driver's own account of samples and tasks."""
        if isinstance(event, (Heartbeat, TaskDone, Spooled, Published)):
            self._metrics.progressed()
        match event:
            case TaskDone(worker) if worker in self._table.workers:
                task = self._table.task_done(worker)
                if task.stage is Stage.DECODE:
                    self._outage.note_success(time.monotonic())
                    self._spool_drain.note_decode(has_failed=False)
                    self._committed(*task.keys)
            case Spooled(worker, node, spooled) if worker in self._table.workers:
                task = self._table.task_done(worker)
                self._spool_drain.note_decode(has_failed=False)
                for item in task.items:
                    if item.sample.key in spooled:
                        item.latents = None  # makes room in the object store
                        self._spool_drain.add(node, item.sample)
                    else:
                        self._committed(item.sample.key)
            case Published(key):
                self._committed(key)
            case WorkerPlaced(worker) if worker in self._table.workers:
                self._table.placed(worker)
            case WorkerReady(worker) if worker in self._table.workers:
                self._table.ready(worker)
            case TaskFailed(worker, failure) if worker in self._table.workers:
                failed = self._table.task_failed(worker, failure)
                if failed and failed.stage is Stage.DECODE and failure.kind is FailureClass.OUTAGE:
                    self._spool_drain.note_decode(has_failed=True)

    def _committed(self, *keys: str) -> None:
        for key in keys:
            self._pending.committed(self._items.pop(key).sample)

    # Actions ----------------------------------------------------------------------------------------------------------

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Admit(count):
                    self._to_admit += count
                case StartWorker(worker, size_class):
                    self._table.start(worker, size_class)
                case KillWorker(worker, failure, rebuild):
                    self._table.lose(worker, failure, rebuild=rebuild)
                case ReleaseWorker(worker, reason):
                    self._table.release(worker, reason)
                case Resized():
                    logger.info(action.reason)
                case Run(worker, keys, stage):
                    items = [self._items[key] for key in keys]
                    for item in items:
                        item.failures = self._scheduler.failures(item.sample.key)
                    self._table.run(worker, items, stage)
                case Checkpoint(worker):
                    self._table.checkpoint(worker)
                case Quarantine(key, failures):
                    item = self._items.pop(key)
                    self._background_tasks.quarantine(item.sample, (*item.earlier, *failures))
                case Abort(failure):
                    if failure.traceback:
                        logger.error(failure.traceback)
                    raise UserError(
                        f"The run cannot go on: {failure.message.rstrip('. ')}. What is committed stays; fix this and "
                        "run the same command again to render the rest."
                    )
                case Finish():
                    self._end = action

    def _awaits_lookup(self) -> bool:
        return self._may_admit() and self._lookups.is_running

    def _may_admit(self) -> bool:
        """Whether samples are wanted; not before the nodes have committed what they hold, which is not looked up."""
        return self._to_admit > 0 and not self._spool_drain.is_scanning

    def _admit(self) -> None:
        """Pass the scheduler as many samples as it asks for, as far as they have been looked up."""
        while self._may_admit():
            pending = self._lookups.next()
            if pending is None:
                if self._lookups.is_exhausted:
                    self._to_admit = 0
                    self._events.append(PlanExhausted())
                return
            if self._pending.counts.committed_before:
                self._scheduler.note_commit()
            self._to_admit -= 1
            sample, params = pending.sample, pending.sample.params
            self._items[sample.key] = InFlight(sample, earlier=pending.earlier, has_steps=pending.has_steps)
            size_class, work = self._context.run.groups.size_class(params.shape), Workload.of(params)
            self._events.append(Admitted(sample.key, pending.stage, params.latent_bytes, size_class, work, params.lora))

    def _report(self) -> None:
        snapshot, now = self._snapshot(), time.monotonic()
        logged = self._progress.log(snapshot)
        if logged and self._metrics.is_due():
            self._metrics.update(
                logged,
                loop_s=self._timer.take_recent_max_s(),
                away_s=max(self._outage.seconds(now), self._scheduler.outage_s(now)),
                is_spool_unusable=self._spool_drain.is_unusable,
            )
        self._recorder.poll(snapshot, now)

    def _snapshot(self) -> Snapshot:
        at, counts = self._scheduler.at, self._pending.counts
        return Snapshot(
            total=self._total - counts.withdrawn_before,
            committed=counts.committed_before + counts.committed,
            quarantined=counts.quarantined_before + counts.quarantined,
            done_before=counts.committed_before + counts.quarantined_before,
            starting=self._scheduler.starting() - self._reservations.deferred,
            encoding=at(Stage.ENCODE),
            denoising=at(Stage.DENOISE),
            decoding=at(Stage.DECODE),
            spooled=self._scheduler.spooled(),
        )
