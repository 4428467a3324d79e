"""A discrete-event simulation of a run: the real scheduler, on a cluster whose nodes, tasks and faults are simulated.

The simulator carries out the actions of the scheduler as the driver would, and answers with events at the times at
which a cluster would send them. It has no clock of its own and no I/O, and is deterministic for a seed.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.limits import RetryLimits, StageLimits
from hv_batch.job.scheduling.messages import (
    Abort,
    Action,
    Admit,
    Checkpoint,
    Event,
    Finish,
    Heartbeat,
    KillWorker,
    PlanExhausted,
    Quarantine,
    ReleaseWorker,
    Resized,
    Run,
    StartWorker,
    StopRequested,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerId,
    WorkerLost,
)
from hv_batch.job.scheduling.scheduler import Scheduler
from hv_batch.job.simulation.clock import Clock
from hv_batch.job.simulation.cluster import Cluster, SimulatedWorker
from hv_batch.job.simulation.fleet import Demand
from hv_batch.job.simulation.ledger import Ledger, Use, lost_to
from hv_batch.job.simulation.samples import SamplePlan, number_of
from hv_batch.job.simulation.scenario import Scenario
from hv_batch.job.simulation.step_checkpoints import StepCheckpoints
from hv_batch.job.stages import Stage
from hv_batch.protocol import UserError

STUCK_S = 86_400.0  # without the start of a task: the cluster cannot render what is left
TICK_S = 30.0  # the scheduler checks backoffs, exchanges and starved stages
HEARTBEAT_SHARE = 0.8  # of the time after which a task counts as hung; a run sends more of them
DRAIN_TICK_S = 2.0  # the same while nodes drain, for checkpoints and the end of their workers


@dataclass(kw_only=True)
class Limits:
    """What the scheduler of a run gets, and the GPUs of a worker by stage and size class."""

    stages: dict[Stage, StageLimits]
    retries: RetryLimits
    drain_s: float
    demands: Mapping[tuple[Stage, int], Demand]
    checkpoint_every: int = 0  # steps between two step checkpoints; 0: only on request


@dataclass(kw_only=True)
class Outcome:
    """How a simulated run ended."""

    committed: bytearray  # by sample number: how often
    denoised: bytearray  # by sample number: how often
    ledger: Ledger
    seconds: float = 0.0  # from the command to the end
    quarantined: list[int] = field(default_factory=list)  # sample numbers
    lost: dict[FailureClass, float] = field(default_factory=lambda: defaultdict(float))  # GPU-seconds of denoises
    losses: Counter[FailureClass] = field(default_factory=Counter)  # workers
    pool_sizes: list[int] = field(default_factory=list)  # of an `auto` pool of decoders, in order
    first_denoise: float | None = None  # when it began
    steps: int = 0  # of the scheduler
    drained: bool = False


class Simulator:
    """One run. `run` must be called once."""

    def __init__(self, limits: Limits, plan: SamplePlan, scenario: Scenario) -> None:
        self._limits = limits
        self._plan = plan
        self._scenario = scenario
        self.clock = Clock()
        self.random = random.Random(scenario.seed)
        self.cluster = Cluster(scenario, limits.demands, self.clock, self.send)
        self.outcome = Outcome(
            committed=bytearray(plan.count), denoised=bytearray(plan.count), ledger=self.cluster.ledger
        )
        self._events: deque[Event] = deque()
        self._lost_with_node: set[WorkerId] = set()
        self._checkpoints = StepCheckpoints(limits.checkpoint_every)
        self._has_ended = False
        self._progress_at = 0.0  # when a task last began
        self._scheduler = Scheduler(limits.stages, limits.retries, limits.drain_s)

    def run(self) -> Outcome:
        """Raises UserError if the scheduler ends the run, as `hv-batch run` would, or if the cluster is too small."""
        self.clock.at(self._scenario.start_s, self._begin)
        while not self._has_ended:
            self.clock.advance()
            self.cluster.place()
            self._process_events()
        self.cluster.account_free()
        for name in list(self.cluster.workers):
            self.cluster.end(name, Use.TAIL)
        self.outcome.seconds = self.clock.now
        return self.outcome

    def send(self, event: Event) -> None:
        """Give the scheduler an event at the current time."""
        self._events.append(event)

    def lose_node(self, node: int) -> None:
        """A node is gone, with the workers that are left on it."""
        self.cluster.drain(node)
        for worker in self.cluster.on_node(node):
            self._lost_with_node.add(worker.id)
            self.send(WorkerLost(worker.id, Failure(FailureClass.INFRA, "its node died")))
        self._process_events()
        for worker in self.cluster.on_node(node):  # if the run has ended
            self.cluster.end(worker.id, Use.PREEMPTION)
        self.cluster.leave(node)

    def _begin(self) -> None:
        self.cluster.begin()
        if self._scenario.stop_after_s is not None:
            self.clock.at(self._scenario.stop_after_s, self._stop)
        self.clock.after(TICK_S, self._tick)
        self._carry_out(self._scheduler.begin())

    def _process_events(self) -> None:
        while self._events and not self._has_ended:
            self.outcome.steps += 1
            self._carry_out(self._scheduler.step(self._events.popleft(), self.clock.now))

    def _tick(self) -> None:
        if self.clock.now - self._progress_at > STUCK_S:
            raise UserError(
                f"The simulated cluster has too few GPUs: nothing happened from hour {self._progress_at / 3600:.1f} "
                f"on, with {sum(self.outcome.committed):,} of {self._plan.count:,} samples rendered. Raise nodes or "
                "gpus_per_node, or use smaller groups."
            )
        self.send(Tick())
        self.clock.after(DRAIN_TICK_S if self.cluster.has_draining else TICK_S, self._tick)

    def _stop(self) -> None:
        self.cluster.begin_tail()
        self.send(StopRequested())

    # Actions of the scheduler -----------------------------------------------------------------------------------------

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Admit(count):
                    self._admit(count)
                case StartWorker(worker, size_class):
                    self.cluster.request(worker, size_class)
                case KillWorker(worker, failure):
                    self._lose(worker, failure)
                case ReleaseWorker(worker):
                    self.cluster.end(worker, Use.TAIL)  # it has no task to lose
                case Run(worker, keys, stage):
                    self._begin_task(self.cluster.workers[worker], keys, stage)
                case Checkpoint(worker):
                    for key in self.cluster.workers[worker].keys:
                        self._checkpoints.request(key, self.clock.now)
                case Quarantine(key, _):
                    self.outcome.quarantined.append(number_of(key))
                    self._checkpoints.forget(key)
                case Resized(Stage.DECODE, workers):
                    self.outcome.pool_sizes.append(workers)
                case Abort(failure):
                    raise UserError(f"The simulated run cannot go on: {failure.message.rstrip('.')}.")
                case Finish(drained):
                    self._has_ended, self.outcome.drained = True, drained
        self.cluster.place()

    def _admit(self, count: int) -> None:
        admitted = self._plan.admit(count)
        self._events.extend(admitted)
        if len(admitted) < count:
            self.send(PlanExhausted())
        if self._plan.is_exhausted:
            self.cluster.begin_tail()

    def _lose(self, name: WorkerId, failure: Failure) -> None:
        self.outcome.losses[failure.kind] += 1
        use = Use.PREEMPTION if name in self._lost_with_node else lost_to(failure.kind)
        self._lost_with_node.discard(name)
        worker, saved_s = self.cluster.workers[name], 0.0
        is_denoise = worker.stage is Stage.DENOISE and bool(worker.keys)
        if is_denoise and len(worker.keys) == 1:
            saved_s = self._checkpoints.lose(worker.keys[0], self.clock.now)
        lost = self.cluster.end(name, use, saved_s)
        if is_denoise:
            self.outcome.lost[failure.kind] += lost

    # Tasks ------------------------------------------------------------------------------------------------------------

    def _begin_task(self, worker: SimulatedWorker, keys: tuple[str, ...], stage: Stage) -> None:
        self.cluster.begin_task(worker, keys, stage)
        self._progress_at = self.clock.now
        work_s = self._denoise_s(keys) if stage is Stage.DENOISE else self._task_s(keys, stage)
        seconds = work_s + self._scenario.turn_s
        self.clock.after(seconds, lambda: self._end_task(worker, keys))
        heartbeat_s = HEARTBEAT_SHARE * self._limits.stages[worker.id.stage].task_timeout_s
        if seconds > heartbeat_s:
            self.clock.after(heartbeat_s, lambda: self._send_heartbeat(worker, keys, heartbeat_s))

    def _task_s(self, keys: tuple[str, ...], stage: Stage) -> float:
        return self._jitter() * sum(self._plan.kind(key).seconds(stage) for key in keys)

    def _denoise_s(self, keys: tuple[str, ...]) -> float:
        if self.outcome.first_denoise is None:
            self.outcome.first_denoise = self.clock.now
        if len(keys) > 1:  # quick samples, without step checkpoints
            return self._task_s(keys, Stage.DENOISE)
        kind, jitter = self._plan.kind(keys[0]), self._jitter()
        step_s = kind.denoise_s * jitter / kind.steps
        return step_s * self._checkpoints.begin(keys[0], kind.steps, self.clock.now, step_s)

    def _jitter(self) -> float:
        return 1 + self._scenario.jitter * (2 * self.random.random() - 1)

    def _is_running(self, worker: SimulatedWorker, keys: tuple[str, ...]) -> bool:
        return self.cluster.workers.get(worker.id) is worker and worker.keys == keys

    def _send_heartbeat(self, worker: SimulatedWorker, keys: tuple[str, ...], every_s: float) -> None:
        if self._is_running(worker, keys):
            self.send(Heartbeat(worker.id))
            self.clock.after(every_s, lambda: self._send_heartbeat(worker, keys, every_s))

    def _end_task(self, worker: SimulatedWorker, keys: tuple[str, ...]) -> None:
        if not self._is_running(worker, keys):
            return
        numbers = [number_of(key) for key in keys]
        if worker.stage is Stage.DENOISE:
            for key in keys:
                self._checkpoints.forget(key)
            if not self._plan.poisoned.isdisjoint(numbers):
                self.cluster.end_task(worker, is_good=False)
                self.send(TaskFailed(worker.id, Failure(FailureClass.POISON, "latents are not finite")))
                return
        self.cluster.end_task(worker, is_good=True)
        if worker.stage is not Stage.ENCODE:
            counts = self.outcome.denoised if worker.stage is Stage.DENOISE else self.outcome.committed
            for number in numbers:
                counts[number] += 1
        self.send(TaskDone(worker.id))
