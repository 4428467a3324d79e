"""A simulated runtime for the scheduler.

It carries out the actions of the scheduler, lets a test decide the outcome of each task and start, and checks the
invariants in the docstring of scheduler.py after each step.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import pytest

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling import backpressure
from hv_batch.job.scheduling.limits import RetryLimits, SizeClass, StageLimits
from hv_batch.job.scheduling.messages import (
    Abort,
    Admit,
    Admitted,
    Checkpoint,
    Finish,
    Heartbeat,
    KillWorker,
    PlanExhausted,
    Published,
    Quarantine,
    ReleaseWorker,
    Run,
    Spooled,
    SpoolLost,
    StartWorker,
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
from hv_batch.job.scheduling.object_store_budget import ASSUMED_EMBEDDING_BYTES
from hv_batch.job.scheduling.scheduler import Scheduler
from hv_batch.job.scheduling.workers.scaling import MAKES_ROOM, OTHER_SIZE
from hv_batch.job.scheduling.workers.worker_slots import END_MARGIN_S
from hv_batch.job.stages import Stage

RETRIES = RetryLimits(poison=2, oom=2, infra=3, preempted=5, worker=4)
STALL_S = 50.0
MIB = 2**20
CHARGED_KINDS = [FailureClass.POISON, FailureClass.INFRA, FailureClass.GPU_OOM, FailureClass.PREEMPTED]


def limits(
    encoders=1, groups=2, decoders=1, batch=3, result_bytes=math.inf, *, colocated=False, ranks=(1,), micro_batch=1
):
    """Stage limits for a test.

    With `colocated`, encoders use the groups' resources. With `decoders=0`, groups decode. `groups` is the number of
    groups of the largest size; `ranks` has the ranks of a group of each size, largest first. Up to `micro_batch` quick
    samples share a denoise, or a decode of a decoder.
    """
    share = {"task_timeout_s": STALL_S, "result_bytes": result_bytes}
    size_classes = [
        SizeClass(
            ranks=each,
            workers=groups * ranks[0] // each,
            ahead=groups + batch,
            name=f"group of {each}" if len(ranks) > 1 else "",
        )
        for each in ranks
    ]
    ahead = (decoders or groups) + 1
    groups = max(size_class.workers for size_class in size_classes)
    return {
        Stage.ENCODE: StageLimits(workers=encoders, is_colocated=colocated, batch=batch, ahead=batch, **share),
        Stage.DENOISE: StageLimits(
            workers=groups,
            batch=micro_batch,
            ahead=sum(size_class.ahead for size_class in size_classes),
            size_classes=tuple(size_classes),
            **share,
        ),
        Stage.DECODE: StageLimits(
            workers=decoders, batch=micro_batch if decoders else 1, ahead=ahead, task_timeout_s=STALL_S
        ),
    }


@dataclass
class World:
    """The simulated runtime, with its own accounts of samples, workers and bytes to check the scheduler against."""

    stages: dict[Stage, StageLimits]
    plan: list[Admitted]
    drain_timeout_s: float = 100.0
    has_room: bool = True  # requested workers are placed at once
    embedding_bytes: dict[str, int] = field(default_factory=dict)
    now: float = 0.0
    starting: list[WorkerId] = field(default_factory=list)
    abandoned: set[tuple[Stage, int]] = field(default_factory=set)  # slots killed without a rebuild
    idle: set[WorkerId] = field(default_factory=set)
    running: dict[WorkerId, tuple[str, ...]] = field(default_factory=dict)
    leaving: dict[WorkerId, float] = field(default_factory=dict)
    checkpoints: list[WorkerId] = field(default_factory=list)
    released: list[WorkerId] = field(default_factory=list)
    killed: dict[WorkerId, Failure] = field(default_factory=dict)
    events: deque = field(default_factory=deque)
    stopped_at: float | None = None
    at: dict[str, Stage] = field(default_factory=dict)
    sizes: dict[WorkerId, int] = field(default_factory=dict)  # size class of each worker that was ever started
    spooled: dict[str, bool] = field(default_factory=dict)  # videos on the disks of nodes; whether latents are stored
    committed: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    quarantines: list[Quarantine] = field(default_factory=list)
    runs: Counter = field(default_factory=Counter)
    held_bytes: dict[tuple[Stage, int], dict[str, int]] = field(
        default_factory=lambda: defaultdict(dict)
    )  # by producing (stage, slot), then by sample
    largest_embedding: int = 0  # bytes
    finish: Finish | None = None
    abort: Abort | None = None

    def __post_init__(self):
        self.scheduler = Scheduler(self.stages, RETRIES, self.drain_timeout_s)
        self.queue = list(self.plan)
        self.carry_out(self.scheduler.begin())
        self.process_events()

    def feed(self, event):
        self.events.append(event)
        self.process_events()

    def process_events(self):
        while self.events:
            event = self.events.popleft()
            if isinstance(event, Admitted):
                self.at[event.key] = event.stage
            if isinstance(event, StopRequested):
                self.stopped_at = self.now
            self.carry_out(self.scheduler.step(event, self.now))

    def carry_out(self, actions):
        for action in actions:
            assert self.finish is None, f"{action} after the end of the run"
            assert self.abort is None, f"{action} after the abort"
            self.carry_out_one(action)
        self.check([action for action in actions if isinstance(action, ReleaseWorker)])

    def carry_out_one(self, action):
        match action:
            case Admit(count):
                batch, self.queue = self.queue[:count], self.queue[count:]
                self.events.extend(batch)
                if len(batch) < count:
                    self.events.append(PlanExhausted())
            case StartWorker(worker, size_class):
                self.sizes[worker] = size_class
                assert (worker.stage, worker.slot) not in self.abandoned, (
                    "started in a slot that was killed without a rebuild"
                )
                self.starting.append(worker)
                if self.has_room:
                    self.events.append(WorkerPlaced(worker))
            case KillWorker(worker, failure, rebuild):
                if not rebuild and failure.kind is not FailureClass.PREEMPTED and worker not in self.leaving:
                    self.abandoned.add((worker.stage, worker.slot))
                self.put_back(self.running.pop(worker, ()))
                self.end(worker)
                self.killed[worker] = failure
            case ReleaseWorker(worker):
                assert worker not in self.running, "released while it runs a task"
                self.end(worker)
                self.released.append(worker)
            case Checkpoint(worker):
                assert worker.stage is Stage.DENOISE
                assert {self.at[key] for key in self.running[worker]} == {Stage.DENOISE}
                self.checkpoints.append(worker)
            case Run(worker, keys, stage):
                self.idle.remove(worker)
                assert worker not in self.leaving, "a task for a worker on a draining node"
                assert all(self.at[key] == stage for key in keys), "ran at the wrong stage"
                assert worker.stage is self.worker_stage(stage)
                size_classes = {begun.size_class for begun in self.plan if begun.key in keys}
                assert stage is not Stage.DENOISE or size_classes == {self.sizes[worker]}, (
                    "ran on a group of another size"
                )
                assert not {k for task in self.running.values() for k in task} & set(keys), "ran twice at once"
                assert len(keys) <= self.stages[stage].batch
                self.running[worker] = keys
                self.runs.update((stage, key) for key in keys)
                if stage is not Stage.DECODE:
                    self.reserve_bytes(worker, keys)
            case Quarantine(key, _):
                self.release_bytes(key, *Stage)
                self.quarantined.append(key)
                self.quarantines.append(action)
                del self.at[key]
            case Abort():
                self.abort = action
            case Finish():
                self.finish = action

    def reserve_bytes(self, worker, keys):
        """Reserve the expected result bytes of a task. They must fit the budget, unless they are the only result."""
        own_bytes, latents = (
            self.held_bytes[worker.stage, worker.slot],
            {begun.key: begun.latent_bytes for begun in self.plan},
        )
        coming = {
            Stage.ENCODE: lambda key: self.largest_embedding or ASSUMED_EMBEDDING_BYTES,
            Stage.DENOISE: latents.get,
        }
        own_bytes.update((key, coming[worker.stage](key)) for key in keys if worker.stage in coming)
        assert sum(own_bytes.values()) <= self.stages[worker.stage].result_bytes or len(own_bytes) == 1, (
            f"{own_bytes} of {worker}"
        )

    def release_bytes(self, key, *stages):
        for (stage, _), own_bytes in self.held_bytes.items():
            if stage in stages:
                own_bytes.pop(key, None)

    def worker_stage(self, stage):
        """The stage whose workers run the tasks of `stage`."""
        return stage if self.stages[stage].workers else Stage.DENOISE

    def still_needs(self, key, stage):
        """Whether a sample in flight still needs a worker of the stage. A drain starts only decodes."""
        decodes = stage is self.worker_stage(Stage.DECODE)
        if self.stopped_at is None:
            return decodes or self.at[key] <= stage
        if not decodes or self.at[key] is Stage.ENCODE:
            return False
        return self.at[key] is Stage.DECODE or any(key in task for task in self.running.values())

    def end(self, worker):
        self.starting = [other for other in self.starting if other != worker]
        self.idle.discard(worker)
        self.leaving.pop(worker, None)

    def check_released(self, action):
        """A release must leave a stage, or a group size, with work at least one worker, alive or requested.

        The exceptions: another group size takes the place, or other stages make room for the first group.
        """
        stage, size_class = action.worker.stage, self.sizes[action.worker]
        left = [w for w in (*self.starting, *self.idle, *self.running) if w.stage is stage]
        if action.reason == OTHER_SIZE:
            assert left, "released in favour of no other group"
            return
        if action.reason == MAKES_ROOM and stage is not Stage.DENOISE and set(self.groups()) <= set(self.starting):
            return
        coming = [begun for begun in self.plan if begun.key in self.at and self.still_needs(begun.key, stage)]
        if stage is Stage.DENOISE:
            left = [worker for worker in left if self.sizes[worker] == size_class]
            coming = [begun for begun in coming if begun.size_class == size_class]
        assert left or not coming, "released the last worker that is needed"

    def groups(self):
        return [w for w in (*self.starting, *self.idle, *self.running) if w.stage is Stage.DENOISE]

    def ranks(self):
        return sum(self.stages[Stage.DENOISE].sizes[self.sizes[group]].ranks for group in self.groups())

    def check(self, released):
        """Check the invariants after a step. `released` are the ReleaseWorker actions of the step."""
        gone = Counter(self.committed) + Counter(self.quarantined)
        assert all(count == 1 for count in gone.values()), "a sample left twice"
        assert not self.spooled.keys() & (gone.keys() | self.at.keys()), "in two places"
        assert self.scheduler.spooled() == len(self.spooled) <= backpressure.MAX_SPOOLED
        assert len(self.at) <= self.scheduler.window
        assert self.ranks() <= max(
            size_class.ranks * size_class.workers for size_class in self.stages[Stage.DENOISE].sizes
        )
        if not (self.finish or self.abort):
            assert self.scheduler.in_flight() == self.at
            for action in released:
                self.check_released(action)
            for worker, until in self.leaving.items():
                assert worker in self.running, "kept on a draining node without a task"
                assert self.now < until - END_MARGIN_S, "kept until its node went away"
        for (stage, _), own_bytes in self.held_bytes.items():
            if stage is Stage.DENOISE:
                assert sum(own_bytes.values()) <= self.stages[stage].result_bytes or len(own_bytes) == 1
        for stage in (Stage.DENOISE, Stage.DECODE):
            begun_elsewhere = sum(1 for admitted in self.plan if admitted.stage is stage)
            running = {key for task in self.running.values() for key in task}
            waiting = [key for key, place in self.at.items() if place is stage and key not in running]
            room = (self.stages[stage].ahead + self.stages[stage].workers) * self.stages[stage].batch
            assert len(waiting) <= room + begun_elsewhere

    # Events of the simulated cluster ----------------------------------------------------------------------------------

    def ready(self, worker):
        self.starting.remove(worker)
        self.idle.add(worker)
        self.feed(WorkerReady(worker))

    def done(self, worker):
        keys = self.running.pop(worker)
        self.idle.add(worker)
        for key in keys:
            self.release_bytes(key, Stage(self.at[key] - 1) if self.at[key] else None)
            if self.at[key] is Stage.DECODE:
                self.committed.append(key)
                del self.at[key]
            else:
                self.at[key] = Stage(self.at[key] + 1)
        weights = tuple(self.embedding_bytes.get(key, 1) for key in keys if worker.stage is Stage.ENCODE)
        if weights:
            self.largest_embedding = max(self.largest_embedding, *weights)
            self.held_bytes[worker.stage, worker.slot].update(zip(keys, weights, strict=True))
        self.feed(TaskDone(worker, weights))

    def spool(self, worker):
        """Finish a decode during an outage: every other video is spooled, the others are committed."""
        keys = self.running.pop(worker)
        self.idle.add(worker)
        for key in keys:
            self.release_bytes(key, Stage.DENOISE)
            del self.at[key]
        self.spooled.update((key, True) for key in keys[::2])
        self.committed.extend(keys[1::2])
        self.feed(Spooled(worker, "node", keys[::2]))

    def publish(self, key):
        del self.spooled[key]
        self.committed.append(key)
        self.feed(Published(key))

    def lose_spooled(self, key, stage):
        del self.spooled[key]
        self.at[key] = stage
        self.feed(SpoolLost(key, stage))

    def put_back(self, keys):
        for key in keys:
            if key in self.at and self.at[key] is not Stage.DECODE:
                self.release_bytes(key, Stage.ENCODE, Stage.DENOISE)
            if key in self.at and self.at[key] is Stage.DENOISE:
                self.at[key] = Stage.ENCODE

    def failed(self, worker, kind):
        keys = self.running.pop(worker)
        self.idle.add(worker)
        self.put_back(keys)
        self.feed(TaskFailed(worker, Failure(kind, "failed")))

    def lost(self, worker, kind):
        self.feed(WorkerLost(worker, Failure(kind, "lost")))

    def leave(self, worker, seconds):
        self.leaving[worker] = self.now + seconds
        self.feed(WorkerLeaving(worker, self.now + seconds))

    def tick(self, seconds):
        self.now += seconds
        self.feed(Tick())

    def pass_time_until(self, seconds, until):
        """Let at most `seconds` pass, with heartbeats of all running tasks, until `until()` holds."""
        end = self.now + seconds
        while self.now < end and not until():
            for worker in self.running:
                self.feed(Heartbeat(worker))
            self.tick(1.0)

    def run_to_end(self, limit=10_000):
        """Let every start and task succeed until the run ends."""
        for _ in range(limit):
            if self.finish or self.abort:
                return
            if self.starting:
                self.ready(self.starting[0])
            elif self.running:
                self.done(next(iter(self.running)))
            elif self.spooled:
                self.publish(next(iter(self.spooled)))
            else:
                self.tick(1.0)
        pytest.fail(f"the run did not end: {self.at} in flight, {self.running} running")


def plan_of(count, stage=Stage.ENCODE):
    return [Admitted(f"s{i}", stage) for i in range(count)]


def advance(world, until):
    """Let every start and task succeed until `until(world)` holds."""
    for _ in range(1000):
        if until(world):
            return
        if world.starting:
            world.ready(world.starting[0])
        elif world.running:
            world.done(next(iter(world.running)))
        else:
            world.tick(1.0)
    pytest.fail("the condition was never reached")


def pass_time(world, seconds):
    """Let `seconds` pass, with heartbeats of all running tasks."""
    while seconds > 0:
        for worker in world.running:
            world.feed(Heartbeat(worker))
        world.tick(min(seconds, 0.5 * STALL_S))
        seconds -= 0.5 * STALL_S


def denoising(world):
    return sorted(worker for worker in world.running if worker.stage is Stage.DENOISE)


def until_denoising(world, groups):
    while len(denoising(world)) < groups and not world.quarantined:
        early = [worker for worker in world.running if worker.stage is Stage.ENCODE]
        world.ready(world.starting[0]) if world.starting else world.done(early[0])


def drive(world, bad):
    """Run to the end. `bad(worker, keys)` returns the failure of a task as (World method, failure class), or None."""
    for _ in range(10_000):
        if world.finish or world.abort:
            return
        if world.starting:
            world.ready(world.starting[0])
        elif world.running:
            worker, keys = next(iter(world.running.items()))
            fault = bad(worker, keys)
            getattr(world, fault[0])(worker, fault[1]) if fault else world.done(worker)
        else:
            world.tick(5.0)
    pytest.fail("the run did not end")
