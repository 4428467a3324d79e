"""The scheduler: a state machine without clock, I/O or Ray. `step(event, now)` returns the actions to carry out.

A sample passes three stages: encode, denoise, decode (which also commits). Each stage has worker slots, of which as
many are in use as there are resources and work for (scaling.py). A worker is an encoder actor, a denoise group (the
whole group counts as one worker) or a decoder actor. If there are no decoders, idle groups decode what groups have
denoised; a decode has priority over a denoise.

Invariants, which tests/job/scheduling/test_scheduler.py checks after each step of generated histories:

- Each admitted sample is in exactly one place: waiting at one stage, in exactly one running task, spooled (its video
  waits on the disk of a node because the output root is unreachable), or no longer in flight.
- A sample leaves exactly once: committed (its DECODE task is done, or its video published) or quarantined (P1). A drain
  leaves the other samples to a resume.
- At most `window` samples are at the stages and MAX_SPOOLED are spooled. A slow decoder slows the groups down and never
  fills the object store (backpressure.py, P7).
- While nothing is committed, many samples that fail alike end the run (`retries.StopRule`). Otherwise:
- A failure costs its sample at most its tries and its worker at most a restart; all other work continues (P5). A failed
  batch is tried again sample by sample, and none of its members is charged. An outage of the output root charges no
  sample.
- A worker on a draining node gets no further task. Its running task may finish in time. It writes a step checkpoint at
  once and again near the end. A failure after that is PREEMPTED, which counts against neither sample nor slot (P4, P5).
- A worker is released only while it runs no task, and a stage with work keeps, or requests, at least one worker. The
  exception: until the first group is placed, all other workers make room for it.
- A sample is denoised by a group of the size that it was admitted with (its size class). The living groups never hold
  more ranks than the run may have, and no size class starves (size_classes.py).
- An event of an earlier incarnation of a worker changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.backpressure import Backpressure
from hv_batch.job.scheduling.demand import find_bottleneck, needed_groups, needed_workers
from hv_batch.job.scheduling.drain import Drain
from hv_batch.job.scheduling.limits import OUTAGE_PAUSE_S, RetryLimits, StageLimits
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
    Spooled,
    SpoolLost,
    StopRequested,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerId,
    WorkerLeaving,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from hv_batch.job.scheduling.object_store_budget import ObjectStoreBudget
from hv_batch.job.scheduling.outage import OutageTimer
from hv_batch.job.scheduling.pool_sizing import PoolSizer
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.scheduling.retries import StopRule, all_workers_lost, charge_failure
from hv_batch.job.scheduling.task_starts import TaskStarts
from hv_batch.job.scheduling.workers.scaling import WorkerScaling
from hv_batch.job.scheduling.workers.worker_slots import Status, WorkerSlot
from hv_batch.job.stages import STAGES, Stage


class Scheduler:
    """Pass each event to `step` and carry out the returned actions in order."""

    def __init__(self, stages: dict[Stage, StageLimits], retries: RetryLimits, drain_timeout_s: float) -> None:
        self._limits = stages
        self._retries = retries
        self._store_budget = ObjectStoreBudget({stage: limits.result_bytes for stage, limits in stages.items()})
        self._queues = Queues(self._store_budget, len(stages[Stage.DENOISE].sizes))
        self._pools = PoolSizer(stages)
        self._backpressure = Backpressure(stages, self._queues, self._store_budget)
        self._scaling = WorkerScaling(stages, self._pools)
        self._task_starts = TaskStarts(self._queues, self._scaling, self._backpressure, self._store_budget)
        # (stage, size class) of each worker that was ever ready, which proves that config and weights are valid.
        self._proven: set[tuple[Stage, int]] = set()
        self._last_loss: dict[tuple[Stage, int], Failure] = {}
        self._outage = OutageTimer()
        self._stop_rule = StopRule(retries)
        self._requested = 0  # admissions that are requested and not answered yet
        self._exhausted = False
        self._drain = Drain(drain_timeout_s)
        self._ended = False

    @property
    def window(self) -> int:
        """Maximum number of samples at the stages: the capacity of all stages if every task is a full batch."""
        return self._backpressure.window

    def in_flight(self) -> dict[str, Stage]:
        """The stage of each sample that is at one, by key."""
        return self._queues.stages()

    def spooled(self) -> int:
        """How many videos wait on the disks of nodes."""
        return self._queues.spooled

    def at(self, stage: Stage) -> int:
        """How many samples wait or run at a stage."""
        return self._queues.at(stage)

    def outage_s(self, now: float) -> float:
        """How long tasks have found the output root unreachable; 0 if they reach it."""
        return self._outage.seconds(now)

    def starting(self) -> int:
        """How many workers are requested or loading."""
        return self._scaling.count_starting()

    def groups_to_come(self, now: float) -> list[int]:
        """How many groups of each size class will start if no further event comes, including after a pause."""
        size_classes = self._scaling.size_classes
        if self._ended:
            return [0] * len(size_classes)
        return size_classes.to_come(self._scaling.most_groups(self._needed(), now))

    def failures(self, key: str) -> tuple[Failure, ...]:
        """The failures charged to a sample in flight so far."""
        return tuple(self._queues.failures(key))

    def note_commit(self) -> None:
        """The output root holds a commit, so a fault does not concern every sample (see `StopRule`)."""
        self._stop_rule.note_commit()

    def begin(self) -> list[Action]:
        """The first actions. No worker starts before a sample needs it."""
        return self._next_actions(0.0)

    def step(self, event: Event, now: float) -> list[Action]:
        """Process one event at `now` (seconds of any monotonic clock) and return the resulting actions."""
        if self._ended:
            return []
        actions = self._apply(event, now)
        if any(isinstance(action, Abort) for action in actions):
            self._ended = True
            return actions
        return actions if self._needs_no_actions(event) else actions + self._next_actions(now)

    # Events -----------------------------------------------------------------------------------------------------------

    def _apply(self, event: Event, now: float) -> list[Action]:
        match event:
            case Admitted(key, stage, latent_bytes, size_class, work, lora):
                self._requested = max(0, self._requested - 1)
                self._queues.admit(key, stage, latent_bytes, size_class, work, lora)
            case Published(key):
                self.note_commit()
                self._outage.resume_decodes(now)
                self._queues.remove_spooled(key)
            case SpoolLost(key, stage):
                self._queues.unspool(key, stage)
            case PlanExhausted():
                self._exhausted, self._requested = True, 0
            case StopRequested():
                return self._start_drain(now)
            case Tick():
                hung = self._end_hung(now)
                workers = self._scaling.watch.leaving()
                leaving = [action for worker in workers for action in self._end_or_checkpoint(worker, now)]
                return [*hung, *leaving, *self._last_checkpoints(now)]
            case _:
                if worker := self._scaling.find(event.worker):
                    return self._apply_to_worker(worker, event, now) + self._end_or_checkpoint(worker, now)
        return []

    def _needs_no_actions(self, event: Event) -> bool:
        """Whether the next actions need not be computed: a thousand ranks send hundreds of heartbeats a second.

        Of the many samples that one Admit brings, only the last needs a computation, and the first if it is the only
        sample in flight.
        """
        is_one_of_many = isinstance(event, Admitted) and self._requested > 0 and len(self._queues) > 1
        return is_one_of_many or isinstance(event, Heartbeat)

    def _start_drain(self, now: float) -> list[Action]:
        """Start the drain, unless it has started. Running denoises may outlast it, so they write checkpoints (P4)."""
        return self._checkpoints() if self._drain.begin(now) else []

    def _last_checkpoints(self, now: float) -> list[Action]:
        """The second checkpoints of a drain, near its end, of denoises that are still running."""
        return self._checkpoints() if self._drain.take_last_checkpoint(now) else []

    def _checkpoints(self) -> list[Action]:
        return [Checkpoint(worker.id) for worker in self._scaling.busy(Stage.DENOISE) if self._denoises(worker)]

    def _denoises(self, worker: WorkerSlot) -> bool:
        return any(self._queues.stage_of(key) is Stage.DENOISE for key in worker.task)

    def _apply_to_worker(self, worker: WorkerSlot, event: Event, now: float) -> list[Action]:
        """Process an event of a living worker."""
        match event:
            case WorkerPlaced():
                worker.note_placed()
            case WorkerReady() if worker.is_starting:
                worker.become_ready(now)
                self._proven.add((worker.id.stage, worker.size_class))
                if worker.id.stage is not Stage.ENCODE:  # groups and decoders access the output root when they start
                    self._outage.end()
            case Heartbeat(_, next_within_s):
                worker.note_heartbeat(next_within_s, now)
            case TaskDone(_, result_bytes) if worker.task:
                self._task_done(worker, result_bytes, now)
            case Spooled(keys=spooled) if worker.task:
                self._spool(worker, spooled, now)
            case TaskFailed(_, failure) if worker.task:
                return self._task_failed(worker, failure, now)
            case WorkerLost(_, failure, counts):
                return self._worker_lost(worker, failure, now, counts=counts)
            case WorkerLeaving(_, until_s):
                worker.leave(until_s, now)
        return []

    def _task_done(self, worker: WorkerSlot, result_bytes: tuple[int, ...], now: float) -> None:
        if self._queues.stage_of(worker.task[0]) is Stage.DECODE:
            self._outage.end()
            self.note_commit()
        keys = self._complete_task(worker, now)
        self._store_budget.record(worker.id, keys, result_bytes)
        for key in keys:
            self._queues.advance(key)

    def _spool(self, worker: WorkerSlot, spooled: tuple[str, ...], now: float) -> None:
        self.note_commit()
        for key in self._complete_task(worker, now):
            if key in spooled:
                self._queues.spool(key)
            else:
                self._queues.advance(key)

    def _complete_task(self, worker: WorkerSlot, now: float) -> tuple[str, ...]:
        stage, seconds = self._queues.stage_of(worker.task[0]), (now - worker.task_started_at) / len(worker.task)
        self._pools.measure(stage, seconds, first=worker.is_fresh)
        if not worker.is_fresh:
            self._backpressure.measure(stage, [self._queues.work(key) for key in worker.task], seconds)
        return worker.complete_task(now)

    def _task_failed(self, worker: WorkerSlot, failure: Failure, now: float) -> list[Action]:
        keys = worker.end_task(now)
        self._avoid(worker, keys, failure)
        worker.note_failure(keys, failure)
        actions = self._charge(worker.id, keys, failure, now)
        is_end = any(isinstance(action, Abort) for action in actions)
        if worker.has_failure_streak and not is_end:
            samples = len(worker.failed_samples)
            reason = f"{samples} different samples failed on it in a row; the last failure: {failure.message}"
            actions += self._worker_lost(worker, replace(failure, kind=FailureClass.POISON, message=reason), now)
        return actions

    def _worker_lost(self, worker: WorkerSlot, failure: Failure, now: float, *, counts: bool = True) -> list[Action]:
        size_class, is_starting = (worker.id.stage, worker.size_class), worker.is_starting
        if failure.kind is FailureClass.FATAL and is_starting and size_class in self._proven:
            # The same config and weights have started on another node, so this node is faulty.
            failure = replace(failure, kind=FailureClass.INFRA)
        is_leaving = worker.leaving_at is not None
        if failure.kind is FailureClass.INFRA and is_leaving:
            failure = replace(failure, kind=FailureClass.PREEMPTED)  # a node may go away earlier than announced
        lost = worker.id
        keys = worker.lose(failure, now, self._retries.worker, counts=counts)
        self._avoid(worker, keys, failure)
        keeps_node = failure.kind is not FailureClass.PREEMPTED and not is_leaving
        actions: list[Action] = [KillWorker(lost, failure, rebuild=keeps_node and worker.status is Status.ABSENT)]
        if failure.kind is FailureClass.OUTAGE:
            worker.pause_until(now + OUTAGE_PAUSE_S)
        if keys or failure.kind in (FailureClass.FATAL, FailureClass.OUTAGE):
            actions += self._charge(lost, keys, failure, now)
        self._last_loss[size_class] = failure
        return actions

    def _avoid(self, worker: WorkerSlot, keys: tuple[str, ...], failure: Failure) -> None:
        for key in keys:
            if failure.kind is FailureClass.INFRA and self._queues.stage_of(key) is Stage.DECODE:
                self._queues.avoid(key, (worker.id.stage, worker.id.slot))

    def _end_or_checkpoint(self, worker: WorkerSlot, now: float) -> list[Action]:
        """The actions that are due for a worker on a draining node; none for other workers."""
        if worker.must_end(now):
            failure = Failure(FailureClass.PREEMPTED, "its node is draining", where=str(worker.id))
            return self._worker_lost(worker, failure, now)
        if worker.take_due_checkpoint(now) and self._denoises(worker):
            return [Checkpoint(worker.id)]
        return []

    def _charge(self, worker: WorkerId, keys: tuple[str, ...], failure: Failure, now: float) -> list[Action]:
        if failure.kind is FailureClass.FATAL:
            return [Abort(failure)]
        # A worker that failed to start has no keys, and must not keep the others from decoding to their spools.
        if failure.kind is FailureClass.OUTAGE and self._outage.fail(now, pause_decodes=bool(keys)):
            return [Abort(replace(failure, kind=FailureClass.FATAL))]
        quarantined: list[Action] = [*charge_failure(self._queues, keys, failure, self._retries)]
        stop = self._stop_rule.note_failure(
            worker, keys, failure, len(quarantined), lambda slots: self._scaling.count_ready(worker.stage, slots)
        )
        return [*quarantined, Abort(stop)] if stop else quarantined

    def _end_hung(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for worker in self._scaling.watch.hung(now):
            limit = self._scaling.watch.limit_s(worker)
            message = f"no progress for {limit:g} s while working on {', '.join(worker.task)}"
            failure = Failure(FailureClass.INFRA, message, where=str(worker.id))
            actions += self._worker_lost(worker, failure, now)
        return actions

    # Actions ----------------------------------------------------------------------------------------------------------

    def _next_actions(self, now: float) -> list[Action]:
        if self._is_finished(now):
            self._ended = True
            return [Finish(drained=self._drain.has_begun and not self._all_done())]
        needed = self._needed()
        groups = needed_groups(self._limits, self._queues, is_draining=self._drain.has_begun)
        self._scaling.size_classes.update(groups, now)
        for stage in STAGES:
            if needed[stage] and (size_class := self._scaling.abandoned(stage)) is not None:
                self._ended = True
                size, last = self._limits[stage].sizes[size_class].name, self._last_loss[stage, size_class]
                return [Abort(all_workers_lost(stage, last, self._retries.worker, size))]
        is_tail = self._exhausted or self._drain.has_begun
        return [
            *self._admissions(),
            *self._scaling.exchanges(now),
            *self._runs(now),
            *self._pools.resize(self._scaling.placed(Stage.DENOISE), now, may_shrink=not is_tail),
            *self._scaling.surplus(needed if is_tail else {}),
            *self._scaling.make_room(needed, self._bottleneck, now),
            *self._scaling.starts(needed, now),
        ]

    def _needed(self) -> dict[Stage, int]:
        return needed_workers(self._limits, self._queues, self._scaling, is_draining=self._drain.has_begun)

    def _bottleneck(self) -> Stage | None:
        return find_bottleneck(self._queues, self._scaling, self._backpressure)

    def _all_done(self) -> bool:
        return self._exhausted and not (len(self._queues) or self._queues.spooled)

    def _is_finished(self, now: float) -> bool:
        if not self._drain.has_begun:
            return self._all_done()
        is_running = any(self._scaling.count_busy(stage) for stage in STAGES)
        has_work = is_running or self._queues.waiting(Stage.DECODE) or self._queues.spooled
        return not has_work or self._drain.is_over(now)

    def _admissions(self) -> Iterator[Action]:
        if self._exhausted or self._requested or self._drain.has_begun:
            return
        if room := self._backpressure.admissible():
            self._requested = room
            yield Admit(room)

    def _runs(self, now: float) -> Iterator[Action]:
        for stage in reversed(STAGES):  # the stage closest to the commit comes first
            may_start = self._outage.may_decode(now) if stage is Stage.DECODE else not self._drain.has_begun
            if may_start:
                yield from self._task_starts.start(stage, now)
