"""The scheduler: a state machine without clock, IO or Ray. `step(event, now)` returns the actions to carry out.

A sample passes three stations: encode, denoise, decode (which also commits). Each station has a fixed number of worker
slots; a worker is an encoder actor, a denoise group (a whole gang counts as one worker) or a decoder actor.

Invariants, which tests/unit/test_scheduler.py checks after every step of generated histories:

- Every admitted sample is in exactly one place: waiting at one station, in exactly one running task, or gone.
- A sample goes exactly once: committed (its DECODE task done) or quarantined (P1). A drain leaves the rest to a resume.
- At most `window` samples are in flight, and a station starts no task whose results the next one has no room for: a
  slow decoder slows the groups instead of filling the object store (P7).
- A failure costs its own sample at most its budget and its worker at most a restart; everything else goes on (P5).
  In particular a batch that fails is tried again sample by sample, and none of its members is charged for it; and
  while the output root does not answer, nobody is.
- News from an earlier life of a worker changes nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from hv_batch.job.errors import Failure, FailureClass
from hv_batch.job.events import (
    Abort,
    Action,
    Admit,
    Admitted,
    Beat,
    Checkpoint,
    Event,
    Finish,
    KillWorker,
    PlanExhausted,
    Quarantine,
    Run,
    Stage,
    StartWorker,
    StopRequested,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerId,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from hv_batch.job.slots import Status, WorkerSlot

# A retried denoise is encoded anew: an encoding costs a thousandth of a denoise, and the embedding may have been lost
# with the node that held it. A retried decode reads the final latents from storage: they were written first (P4).
RETRY_STAGE = {Stage.ENCODE: Stage.ENCODE, Stage.DENOISE: Stage.ENCODE, Stage.DECODE: Stage.DECODE}

# Groups are asked for first: only they need many GPUs of one node at once, and a single actor that lands there first
# would keep them out.
START_ORDER = (Stage.DENOISE, Stage.ENCODE, Stage.DECODE)

OUTAGE_PAUSE_S = 15.0  # between two tries while the output root does not answer
OUTAGE_LIMIT_S = 1800.0  # then the run ends; everything that was stored is there for the same command


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    workers: int
    batch: int = 1  # samples a task may take
    ahead: int  # samples that may wait here; the station before pauses when its results would exceed them
    task_timeout_s: float  # without a Beat for so long a running task counts as hung


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLimits:
    """How many tries a sample has for each class of failure, and how often in a row one worker slot may be lost."""

    poison: int
    oom: int
    infra: int
    preempted: int
    worker: int

    def tries(self, kind: FailureClass) -> int:
        return {
            FailureClass.POISON: self.poison,
            FailureClass.GPU_OOM: self.oom,
            FailureClass.INFRA: self.infra,
            FailureClass.PREEMPTED: self.preempted,
        }[kind]


@dataclass(slots=True)
class _Sample:
    stage: Stage
    solo: bool = False  # was in a batch that failed: from now on it runs alone
    failures: list[Failure] = field(default_factory=list)


class Scheduler:
    """Feed every event to `step` and carry out the actions it returns, in order."""

    def __init__(self, stages: dict[Stage, StageLimits], retries: RetryLimits, drain_timeout_s: float) -> None:
        self._limits = stages
        self._retries = retries
        self._drain_timeout_s = drain_timeout_s
        self._samples: dict[str, _Sample] = {}
        self._waiting: dict[Stage, deque[str]] = {stage: deque() for stage in Stage}
        self._workers = {
            stage: [WorkerSlot(WorkerId(stage, slot, 0)) for slot in range(stages[stage].workers)] for stage in Stage
        }
        self._proven: set[Stage] = set()  # stations that have had a ready worker: config and weights are right
        self._last_loss: dict[Stage, Failure] = {}
        self._outage_since: float | None = None
        self._decode_at = 0.0  # no decode begins before
        self._asked = 0  # admissions ordered and not yet answered
        self._exhausted = False
        self._drain_until: float | None = None
        self._over = False

    @property
    def window(self) -> int:
        """Most samples in flight: what the stations hold while every queue between them is full."""
        return sum(limits.ahead + limits.workers * limits.batch for limits in self._limits.values())

    def in_flight(self) -> dict[str, Stage]:
        return {key: sample.stage for key, sample in self._samples.items()}

    def starting(self) -> int:
        """How many workers are being placed or load."""
        return sum(slot.status is Status.STARTING for slots in self._workers.values() for slot in slots)

    def failures(self, key: str) -> tuple[Failure, ...]:
        """What an in-flight sample has been charged with so far."""
        return tuple(self._samples[key].failures)

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
        return actions + self._next_actions(now)

    # Events -----------------------------------------------------------------------------------------------------------

    def _take(self, event: Event, now: float) -> list[Action]:
        match event:
            case Admitted(key, stage):
                self._admit(key, stage)
            case PlanExhausted():
                self._exhausted, self._asked = True, 0
            case WorkerPlaced(worker_id):
                if worker := self._current(worker_id):
                    worker.placed = True
            case WorkerReady(worker_id):
                if (worker := self._current(worker_id)) and worker.status is Status.STARTING:
                    worker.status = Status.IDLE
                    self._proven.add(worker_id.stage)
            case Beat(worker_id):
                if worker := self._current(worker_id):
                    worker.beat = now
            case TaskDone(worker_id):
                if (worker := self._current(worker_id)) and worker.task:
                    self._task_done(worker)
            case TaskFailed(worker_id, failure):
                if (worker := self._current(worker_id)) and worker.task:
                    return self._task_failed(worker, failure, now)
            case WorkerLost(worker_id, failure):
                if worker := self._current(worker_id):
                    return self._worker_lost(worker, failure, now)
            case StopRequested():
                if self._drain_until is None:
                    self._drain_until = now + self._drain_timeout_s
                    return self._checkpoints()
            case Tick():
                return self._find_hung(now)
        return []

    def _checkpoints(self) -> list[Action]:
        """What is denoised now may outlast the drain, or the patience of whoever asked for it (P4)."""
        groups = self._workers[Stage.DENOISE]
        return [Checkpoint(worker.id) for worker in groups if worker.status is Status.BUSY]

    def _current(self, worker_id: WorkerId) -> WorkerSlot | None:
        worker = self._workers[worker_id.stage][worker_id.slot]
        return worker if worker.id == worker_id and worker.alive else None

    def _admit(self, key: str, stage: Stage) -> None:
        assert key not in self._samples, f"sample {key} admitted twice"
        self._asked = max(0, self._asked - 1)
        self._samples[key] = _Sample(stage)
        self._waiting[stage].append(key)

    def _task_done(self, worker: WorkerSlot) -> None:
        for key in worker.succeed():
            sample = self._samples[key]
            if sample.stage is Stage.DECODE:
                self._outage_since = None
                del self._samples[key]
            else:
                sample.stage = Stage(sample.stage + 1)
                self._waiting[sample.stage].append(key)

    def _task_failed(self, worker: WorkerSlot, failure: Failure, now: float) -> list[Action]:
        keys = worker.release()
        worker.suspect(keys, failure)
        actions = self._charge(keys, failure, now)
        if worker.sick:
            reason = f"{len(worker.suspicious)} different samples failed on it in a row; the last: {failure.message}"
            actions += self._worker_lost(worker, replace(failure, kind=FailureClass.POISON, message=reason), now)
        return actions

    def _worker_lost(self, worker: WorkerSlot, failure: Failure, now: float) -> list[Action]:
        stage, starting = worker.id.stage, worker.status is Status.STARTING
        if failure.kind is FailureClass.FATAL and starting and stage in self._proven:
            # Elsewhere the same config and weights have started, so it is this node that is not right.
            failure = replace(failure, kind=FailureClass.INFRA)
        lost = worker.id
        keys = worker.lose(failure, now, self._retries.worker)
        actions: list[Action] = [KillWorker(lost, failure, rebuild=worker.status is Status.ABSENT)]
        if failure.kind is FailureClass.OUTAGE:
            worker.start_at = now + OUTAGE_PAUSE_S
        if keys or failure.kind in (FailureClass.FATAL, FailureClass.OUTAGE):
            actions += self._charge(keys, failure, now)
        self._last_loss[stage] = failure
        return actions

    def _charge(self, keys: tuple[str, ...], failure: Failure, now: float) -> list[Action]:
        """Put the samples of a failed task back in line, or out of it when their budget is spent."""
        if failure.kind is FailureClass.FATAL:
            return [Abort(failure)]
        if failure.kind is FailureClass.OUTAGE:
            self._outage_since = now if self._outage_since is None else self._outage_since
            self._decode_at = now + OUTAGE_PAUSE_S
            if now - self._outage_since > OUTAGE_LIMIT_S:
                return [Abort(replace(failure, kind=FailureClass.FATAL))]
        actions: list[Action] = []
        for key in keys:
            sample = self._samples[key]
            if len(keys) > 1:
                sample.solo = True
            elif failure.kind is not FailureClass.OUTAGE:
                sample.failures.append(failure)
                spent = Counter(f.kind for f in sample.failures)[failure.kind]
                if spent >= self._retries.tries(failure.kind):
                    del self._samples[key]
                    actions.append(Quarantine(key, tuple(sample.failures)))
                    continue
            sample.stage = Stage.ENCODE if failure.begin_anew else RETRY_STAGE[sample.stage]
            if failure.kind is FailureClass.POISON:
                self._waiting[sample.stage].append(key)
            else:
                self._waiting[sample.stage].appendleft(key)
        return actions

    def _find_hung(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for stage, workers in self._workers.items():
            limit = self._limits[stage].task_timeout_s
            for worker in workers:
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
        for stage, workers in self._workers.items():
            if self._needed(stage) and all(worker.status is Status.ABANDONED for worker in workers):
                self._over = True
                return [Abort(_station_gone(stage, self._last_loss[stage], self._retries.worker))]
        return [*self._admissions(), *self._starts(now), *self._runs(now)]

    def _all_done(self) -> bool:
        return self._exhausted and not self._samples

    def _finished(self, now: float) -> bool:
        if self._drain_until is None:
            return self._all_done()
        running = any(worker.task for workers in self._workers.values() for worker in workers)
        to_decode = bool(self._waiting[Stage.DECODE])
        return not (running or to_decode) or now >= self._drain_until

    def _admissions(self) -> Iterator[Action]:
        if self._exhausted or self._asked or self._drain_until is not None:
            return
        encode = self._limits[Stage.ENCODE]
        early = sum(1 for s in self._samples.values() if s.stage is Stage.ENCODE) + len(self._waiting[Stage.DENOISE])
        room = min(
            self.window - len(self._samples),
            encode.ahead + encode.workers * encode.batch + self._limits[Stage.DENOISE].ahead - early,
        )
        if room > 0:
            self._asked = room
            yield Admit(room)

    def _starts(self, now: float) -> Iterator[Action]:
        needed = {stage: self._needed(stage) for stage in Stage}
        # The first worker of each station comes before the second of any: on a cluster that is too small for all of
        # them, a second encoder must not take the GPU that the only decoder waits for.
        all_served = all(any(slot.ready for slot in self._workers[stage]) for stage in Stage if needed[stage])
        group_placed = any(slot.alive and slot.placed for slot in self._workers[Stage.DENOISE])
        for stage in START_ORDER:
            if stage is not Stage.DENOISE and needed[Stage.DENOISE] and not group_placed:
                continue
            live = sum(slot.alive for slot in self._workers[stage])
            wanted = min(needed[stage], len(self._workers[stage]) if all_served else 1)
            for slot in self._workers[stage]:
                if live < wanted and slot.status is Status.ABSENT and now >= slot.start_at:
                    slot.start()
                    live += 1
                    yield StartWorker(slot.id)

    def _needed(self, stage: Stage) -> int:
        """How many workers of the station could ever be busy with what is in flight."""
        if self._drain_until is not None:  # a drain only finishes what needs a decoder
            return len(self._waiting[stage]) if stage is Stage.DECODE else 0
        return sum(1 for sample in self._samples.values() if sample.stage <= stage)

    def _runs(self, now: float) -> Iterator[Action]:
        for stage in sorted(Stage, reverse=True):  # what is nearest to a commit goes first
            if now < self._decode_at if stage is Stage.DECODE else self._drain_until is not None:
                continue
            for worker in self._workers[stage]:
                room = self._room_after(stage)
                if worker.status is Status.IDLE and self._waiting[stage] and room > 0:
                    worker.run(self._take_batch(stage, room), now)
                    yield Run(worker.id, worker.task)

    def _room_after(self, stage: Stage) -> int:
        """How many more samples the next station could hold if everything running here arrived."""
        if stage is Stage.DECODE:
            return self._limits[stage].batch
        after = Stage(stage + 1)
        coming = sum(len(worker.task) for worker in self._workers[stage])
        return self._limits[after].ahead - len(self._waiting[after]) - coming

    def _take_batch(self, stage: Stage, room: int) -> tuple[str, ...]:
        queue = self._waiting[stage]
        batch = [queue.popleft()]
        while queue and len(batch) < min(self._limits[stage].batch, room):
            if self._samples[batch[0]].solo or self._samples[queue[0]].solo:
                break
            batch.append(queue.popleft())
        return tuple(batch)


def _station_gone(stage: Stage, failure: Failure, losses: int) -> Failure:
    name = {Stage.ENCODE: "text encoder", Stage.DENOISE: "denoise group", Stage.DECODE: "VAE decoder"}[stage]
    message = (
        f"every {name} was lost {losses} times in a row, so no sample can pass it; the last loss: {failure.message}"
    )
    return Failure(FailureClass.FATAL, message, failure.traceback, failure.where)
