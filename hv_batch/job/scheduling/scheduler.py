"""The scheduler: a state machine without clock, IO or Ray. `step(event, now)` returns the actions to carry out.

A sample passes three stages: encode, denoise, decode (which also commits). Each stage has worker slots, of which as
many live as there is room and work for (see staffing.py); a worker is an encoder actor, a denoise group (a whole group
counts as one worker) or a decoder actor. Without decoders, idle groups decode what groups have denoised, which comes
before any further denoise.

Invariants, which tests/job/scheduling/test_scheduler.py checks after every step of generated histories:

- Every admitted sample is in exactly one place: waiting at one stage, in exactly one running task, set aside (its
  video waits on the disk of a node for an output root that does not answer), or gone.
- A sample goes exactly once: committed (its DECODE task done, or its video published) or quarantined (P1). A drain
  leaves the rest to a resume.
- At most `window` samples are at the stages, and SPOOLED_AT_MOST set aside: a slow decoder slows the groups, it never
  fills the object store (backpressure.py, P7).
- A failure costs its own sample at most its budget and its worker at most a restart; everything else goes on (P5).
  In particular a batch that fails is tried again sample by sample, and none of its members is charged for it; and
  while the output root does not answer, nobody is.
- A worker whose node is to be taken away gets no further task. What it runs may finish in time; it writes its step
  checkpoint at once and again near the end, and whatever becomes of it then is PREEMPTED: nobody is blamed (P4, P5).
- A worker is released only while it runs nothing, and a stage with work keeps, or asks for, at least one; but before
  the first group has its place, all others make room for it.
- A sample is denoised by a group of the size that it was admitted with, a size class; groups that live never hold more ranks
  than the run may have, and no size class starves (size_classes.py).
- News from an earlier life of a worker changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.backpressure import Backpressure
from hv_batch.job.scheduling.limits import OUTAGE_LIMIT_S, OUTAGE_PAUSE_S, RetryLimits, StageLimits
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
    Run,
    Spooled,
    SpoolLost,
    StopRequested,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerLeaving,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from hv_batch.job.scheduling.object_store_budget import ObjectStoreBudget
from hv_batch.job.scheduling.pool_sizing import PoolSizer
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.scheduling.retries import all_workers_lost, charge_failure
from hv_batch.job.scheduling.scaling import WorkerScaling
from hv_batch.job.scheduling.worker_slots import LAST_CHECKPOINT_S, Status, WorkerSlot
from hv_batch.job.stages import Stage


class Scheduler:
    """Feed every event to `step` and carry out the actions it returns, in order."""

    def __init__(self, stages: dict[Stage, StageLimits], retries: RetryLimits, drain_timeout_s: float) -> None:
        self._limits = stages
        self._retries = retries
        self._drain_timeout_s = drain_timeout_s
        self._store_budget = ObjectStoreBudget({stage: limits.result_bytes for stage, limits in stages.items()})
        self._queues = Queues(self._store_budget, len(stages[Stage.DENOISE].sizes))
        self._pools = PoolSizer(stages)
        self._backpressure = Backpressure(stages, self._queues, self._store_budget)
        self._scaling = WorkerScaling(stages, self._pools)
        # Stages, and sizes of groups, that have had a ready worker: config and weights are right.
        self._proven: set[tuple[Stage, int]] = set()
        self._last_loss: dict[tuple[Stage, int], Failure] = {}
        self._outage_since: float | None = None
        self._decode_at = 0.0  # no decode begins before
        self._asked = 0  # admissions ordered and not yet answered
        self._exhausted = False
        self._drain_until: float | None = None
        self._last_checkpoint_at = math.inf  # of the drain
        self._over = False

    @property
    def window(self) -> int:
        """Most samples at the stages: what these hold while every queue is full, of quick ones if any."""
        return self._backpressure.window

    def in_flight(self) -> dict[str, Stage]:
        return self._queues.places()

    def spooled(self) -> int:
        """How many videos wait on the disks of nodes."""
        return self._queues.aside

    def at(self, stage: Stage) -> int:
        """How many samples wait or run at a stage."""
        return self._queues.at(stage)

    def starting(self) -> int:
        """How many workers are being placed or load."""
        return sum(slot.status is Status.STARTING for slot in self._scaling)

    def groups_to_come(self, now: float) -> list[int]:
        """How many groups of each size class will be started as things stand, some perhaps after a pause."""
        size_classes = self._scaling.size_classes
        return (
            [0] * len(size_classes)
            if self._over
            else size_classes.to_come(self._scaling.most_groups(self._needed(), now))
        )

    def failures(self, key: str) -> tuple[Failure, ...]:
        """What an in-flight sample has been charged with so far."""
        return tuple(self._queues.failures(key))

    def begin(self) -> list[Action]:
        """The first actions; nothing is started before there is a sample that needs it."""
        return self._next_actions(0.0)

    def step(self, event: Event, now: float) -> list[Action]:
        """Take in one event at `now` (seconds of any monotonic clock)."""
        if self._over:
            return []
        actions = self._take(event, now)
        if any(isinstance(action, Abort) for action in actions):
            self._over = True
            return actions
        return actions if self._changes_nothing(event) else actions + self._next_actions(now)

    # Events -----------------------------------------------------------------------------------------------------------

    def _take(self, event: Event, now: float) -> list[Action]:
        match event:
            case Admitted(key, stage, latent_bytes, size_class, work):
                self._asked = max(0, self._asked - 1)
                self._queues.admit(key, stage, latent_bytes, size_class, work)
            case Published(key):
                self._outage_since, self._decode_at = None, now
                self._queues.drop(key)
            case SpoolLost(key, stage):
                self._queues.take_up(key, stage)
            case PlanExhausted():
                self._exhausted, self._asked = True, 0
            case StopRequested():
                if self._drain_until is None:
                    self._drain_until = now + self._drain_timeout_s
                    self._last_checkpoint_at = max(now + LAST_CHECKPOINT_S, self._drain_until - LAST_CHECKPOINT_S)
                    return self._checkpoints()
            case Tick():
                hung = self._find_hung(now)
                leaving = [action for worker in self._scaling for action in self._part_with(worker, now)]
                return [*hung, *leaving, *self._last_checkpoints(now)]
            case _:
                if worker := self._scaling.find(event.worker):
                    return self._hear(worker, event, now) + self._part_with(worker, now)
        return []

    def _changes_nothing(self, event: Event) -> bool:
        """A thousand ranks beat hundreds of times a second; and samples come many at a time, of which the last counts,
        and the first where nothing else is in flight.
        """
        is_one_more = isinstance(event, Admitted) and self._asked > 0 and len(self._queues) > 1
        return is_one_more or isinstance(event, Heartbeat)

    def _checkpoints(self) -> list[Action]:
        """What is denoised now may outlast the drain, or the patience of whoever asked for it (P4)."""
        return [Checkpoint(worker.id) for worker in self._scaling.of(Stage.DENOISE) if self._denoises(worker)]

    def _last_checkpoints(self, now: float) -> list[Action]:
        """Near the end of a drain, of what will not be through by then."""
        if now < self._last_checkpoint_at:
            return []
        self._last_checkpoint_at = math.inf
        return self._checkpoints()

    def _denoises(self, worker: WorkerSlot) -> bool:
        return any(self._queues.place(key) is Stage.DENOISE for key in worker.task)

    def _hear(self, worker: WorkerSlot, event: Event, now: float) -> list[Action]:
        """News of a worker that lives."""
        match event:
            case WorkerPlaced():
                worker.placed = True
            case WorkerReady() if worker.status is Status.STARTING:
                worker.become_ready(now)
                self._proven.add((worker.id.stage, worker.size_class))
                if worker.id.stage is not Stage.ENCODE:  # it has seen the output root
                    self._outage_since = None
            case Heartbeat(_, next_within_s):
                worker.hear(next_within_s, now)
            case TaskDone(_, result_bytes) if worker.task:
                self._task_done(worker, result_bytes, now)
            case Spooled(keys=spooled) if worker.task:
                self._set_aside(worker, spooled, now)
            case TaskFailed(_, failure) if worker.task:
                return self._task_failed(worker, failure, now)
            case WorkerLost(_, failure, counts):
                return self._worker_lost(worker, failure, now, counts=counts)
            case WorkerLeaving(_, until_s):
                worker.leave(until_s, now)
        return []

    def _task_done(self, worker: WorkerSlot, result_bytes: tuple[int, ...], now: float) -> None:
        if self._queues.place(worker.task[0]) is Stage.DECODE:
            self._outage_since = None
        keys = self._succeed(worker, now)
        self._store_budget.arrive(worker.id, keys, result_bytes)
        for key in keys:
            self._queues.advance(key)

    def _set_aside(self, worker: WorkerSlot, spooled: tuple[str, ...], now: float) -> None:
        for key in self._succeed(worker, now):
            if key in spooled:
                self._queues.set_aside(key)
            else:
                self._queues.advance(key)

    def _succeed(self, worker: WorkerSlot, now: float) -> tuple[str, ...]:
        stage, seconds = self._queues.place(worker.task[0]), (now - worker.begun) / len(worker.task)
        self._pools.measure(stage, seconds, first=worker.is_fresh)
        if not worker.is_fresh:
            self._backpressure.measure(stage, [self._queues.work(key) for key in worker.task], seconds)
        return worker.succeed()

    def _task_failed(self, worker: WorkerSlot, failure: Failure, now: float) -> list[Action]:
        keys = worker.release()
        worker.suspect(keys, failure)
        actions = self._charge(keys, failure, now)
        if worker.sick:
            reason = f"{len(worker.suspicious)} different samples failed on it in a row; the last: {failure.message}"
            actions += self._worker_lost(worker, replace(failure, kind=FailureClass.POISON, message=reason), now)
        return actions

    def _worker_lost(self, worker: WorkerSlot, failure: Failure, now: float, *, counts: bool = True) -> list[Action]:
        place, starting = (worker.id.stage, worker.size_class), worker.status is Status.STARTING
        if failure.kind is FailureClass.FATAL and starting and place in self._proven:
            # Elsewhere the same config and weights have started, so it is this node that is not right.
            failure = replace(failure, kind=FailureClass.INFRA)
        is_leaving = worker.leaving_at is not None
        if failure.kind is FailureClass.INFRA and is_leaving:
            failure = replace(failure, kind=FailureClass.PREEMPTED)  # a node may go earlier than it was told to
        lost = worker.id
        keys = worker.lose(failure, now, self._retries.worker, counts=counts)
        stays = failure.kind is not FailureClass.PREEMPTED and not is_leaving
        actions: list[Action] = [KillWorker(lost, failure, rebuild=stays and worker.status is Status.ABSENT)]
        if failure.kind is FailureClass.OUTAGE:
            worker.start_at = now + OUTAGE_PAUSE_S
        if keys or failure.kind in (FailureClass.FATAL, FailureClass.OUTAGE):
            actions += self._charge(keys, failure, now)
        self._last_loss[place] = failure
        return actions

    def _part_with(self, worker: WorkerSlot, now: float) -> list[Action]:
        """What is due to a worker that leaves; nothing for the others."""
        if worker.must_go(now):
            failure = Failure(FailureClass.PREEMPTED, "what it stands on is to be taken away", where=str(worker.id))
            return self._worker_lost(worker, failure, now)
        if worker.owes_checkpoint(now) and self._denoises(worker):
            return [Checkpoint(worker.id)]
        return []

    def _charge(self, keys: tuple[str, ...], failure: Failure, now: float) -> list[Action]:
        if failure.kind is FailureClass.FATAL:
            return [Abort(failure)]
        if failure.kind is FailureClass.OUTAGE:
            self._outage_since = now if self._outage_since is None else self._outage_since
            if keys:  # a worker that cannot start now keeps nobody from filling a spool
                self._decode_at = now + OUTAGE_PAUSE_S
            if now - self._outage_since > OUTAGE_LIMIT_S:
                return [Abort(replace(failure, kind=FailureClass.FATAL))]
        return list(charge_failure(self._queues, keys, failure, self._retries))

    def _find_hung(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for worker in self._scaling:
            limit = min(self._limits[worker.id.stage].task_timeout_s, worker.next_within_s)
            if worker.status is Status.BUSY and now - worker.beat > limit:
                message = f"no progress for {limit:g} s while working on {', '.join(worker.task)}"
                failure = Failure(FailureClass.INFRA, message, where=str(worker.id))
                actions += self._worker_lost(worker, failure, now)
        return actions

    # Actions ----------------------------------------------------------------------------------------------------------

    def _next_actions(self, now: float) -> list[Action]:
        if self._finished(now):
            self._over = True
            return [Finish(drained=self._drain_until is not None and not self._all_done())]
        needed = self._needed()
        self._scaling.size_classes.note(self._needed_groups(), now)
        for stage in Stage:
            if needed[stage] and (size_class := self._scaling.given_up(stage)) is not None:
                self._over = True
                size, last = self._limits[stage].sizes[size_class].name, self._last_loss[stage, size_class]
                return [Abort(all_workers_lost(stage, last, self._retries.worker, size))]
        is_tail = self._exhausted or self._drain_until is not None
        return [
            *self._admissions(),
            *self._scaling.trades(now),
            *self._runs(now),
            *self._pools.resize(self._scaling.placed(Stage.DENOISE), now, may_shrink=not is_tail),
            *self._scaling.surplus(needed if is_tail else {}),
            *self._scaling.make_room(needed, self._bottleneck(), now),
            *self._scaling.starts(needed, now),
        ]

    def _all_done(self) -> bool:
        return self._exhausted and not (len(self._queues) or self._queues.aside)

    def _finished(self, now: float) -> bool:
        if self._drain_until is None:
            return self._all_done()
        running = any(worker.task for worker in self._scaling)
        is_left = running or self._queues.waiting(Stage.DECODE) or self._queues.aside
        return not is_left or now >= self._drain_until

    def _admissions(self) -> Iterator[Action]:
        if self._exhausted or self._asked or self._drain_until is not None:
            return
        if room := self._backpressure.admissible():
            self._asked = room
            yield Admit(room)

    def _needed(self) -> dict[Stage, int]:
        """How many workers of each stage could ever be busy with what is in flight."""
        if self._drain_until is None:
            needed = {stage: self._queues.yet_to_pass(stage) for stage in Stage}
        else:
            # A drain begins no encoding and no denoise, but what is denoised will be decoded.
            needed = {stage: sum(bool(worker.task) for worker in self._scaling.of(stage)) for stage in Stage}
            needed[Stage.DECODE] += needed[Stage.DENOISE] + self._queues.waiting(Stage.DECODE)
        decode = self._limits[Stage.DECODE]
        if not decode.workers:  # groups decode, so they are needed until the last decode
            needed |= {Stage.DENOISE: needed[Stage.DECODE], Stage.DECODE: 0}
        return needed

    def _needed_groups(self) -> list[int]:
        """How many groups of each size class could ever be busy."""
        decode, queues = self._limits[Stage.DECODE], self._queues
        needed = []
        for size_class in queues.size_classes(Stage.DENOISE):
            if self._drain_until is None:
                coming = queues.yet_to_pass(Stage.DENOISE, size_class)
            else:
                coming = queues.at(Stage.DENOISE, size_class) - queues.waiting(Stage.DENOISE, size_class)
            decoding = 0 if decode.workers else queues.at(Stage.DECODE, size_class)
            needed.append(coming + decoding)
        return needed

    def _bottleneck(self) -> Stage | None:
        """The stage that keeps groups from working: no decoder takes what they have made, or nobody feeds them."""
        idle = self._scaling.idle(Stage.DENOISE)
        has_work = self._queues.waiting(Stage.DENOISE) > 0
        stuck = (
            has_work
            and idle
            and not any(self._backpressure.may_make(slot.id, Stage.DENOISE, slot.size_class) for slot in idle)
        )
        if self._backpressure.room_behind(Stage.DENOISE) <= 0 or stuck:
            return Stage.DECODE
        return None if has_work else Stage.ENCODE

    def _runs(self, now: float) -> Iterator[Action]:
        for stage in sorted(Stage, reverse=True):  # what is nearest to a commit goes first
            if now < self._decode_at if stage is Stage.DECODE else self._drain_until is not None:
                continue
            for worker in self._scaling.idle(stage) if self._queues.waiting(stage) else ():
                size_class = self._backpressure.size_class_for(stage, worker.size_class)
                if size_class is None:
                    continue
                sharers = self._scaling.ready(stage, size_class)
                if not (most := self._backpressure.task_for(worker.id, stage, size_class, sharers)):
                    continue
                worker.run(self._queues.take_batch(stage, size_class, most), now)
                if stage is not Stage.DECODE:
                    self._store_budget.begin(worker.id, worker.task)
                yield Run(worker.id, worker.task, stage)
