"""Simulated nights on up to a thousand GPUs: the real scheduler on a cluster that is simulated with an event heap.

The simulated nodes have GPUs, join, are reclaimed with and without notice, and host a worker only if they have free
GPUs. So the results of a night depend on the decisions of the scheduler.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolved_run import GroupPlans
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.capacity import retry_limits
from hv_batch.job.scheduling.messages import (
    Abort,
    Admit,
    Admitted,
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
    TaskDone,
    TaskFailed,
    Tick,
    WorkerId,
    WorkerLeaving,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from hv_batch.job.scheduling.scheduler import Scheduler
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan

GROUP_GPUS = 8
HEARTBEAT_S = 200.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Samples of one shape."""

    ranks: int
    share: float  # of all samples
    denoise_s: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Parameters of a night. The defaults are the times of 720p on eight GPUs."""

    samples: int
    groups: int
    encoders: int
    decoders: int | Literal["auto"]  # 0: the groups decode
    nodes: int  # of eight GPUs, at the beginning; further nodes are added for encoders and decoders
    batch: int = 8
    load_s: float = 300.0
    encode_s: float = 1.0  # a prompt
    denoise_s: float = 338.0
    mix: tuple[Shape, ...] = ()  # of the manifest's samples, largest groups first; empty: all on eight GPUs
    decode_s: float = 60.0
    turn_s: float = 0.02  # the driver's time for one event and the next action
    poisoned: int = 0  # samples whose denoise always fails
    crash_every_s: float = 0.0  # mean time between deaths of a worker
    reclaim_every_s: float = 0.0  # mean time between node losses, half with two minutes' notice; a node joins later
    joins: tuple[float, ...] = ()  # when further nodes join
    seed: int = 0


@dataclass
class SimulatedWorker:
    id: WorkerId
    gpus: int
    node: int | None = None
    ready: bool = False
    keys: tuple[str, ...] = ()
    begun: float = 0.0


@dataclass
class Night:
    scene: Scene
    now: float = 0.0
    heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    free: dict[int, int] = field(default_factory=dict)  # free GPUs of each node
    draining: set[int] = field(default_factory=set)
    workers: dict[WorkerId, SimulatedWorker] = field(default_factory=dict)
    waiting: list[SimulatedWorker] = field(default_factory=list)  # not placed yet, in the order of request
    committed: Counter = field(default_factory=Counter)
    quarantined: list[str] = field(default_factory=list)
    lost: Counter = field(default_factory=Counter)  # GPU-seconds by cause
    denoised: Counter = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)  # sizes of the decoder pool, in order
    ended: float | None = None
    room: bool = False  # whether a placement may have become possible since the last attempt

    def __post_init__(self):
        scene = self.scene
        self.random = random.Random(scene.seed)
        self.order = count()
        self.node_ids = count()
        self.events: deque[Event] = deque()
        self.plan = deque(f"s{i}" for i in range(scene.samples))
        self.mix = scene.mix or (Shape(ranks=GROUP_GPUS, share=1.0, denoise_s=scene.denoise_s),)
        drawn = self.random.choices(range(len(self.mix)), [shape.share for shape in self.mix], k=scene.samples)
        self.shapes = dict(zip(self.plan, drawn, strict=True))
        self.bad = set(self.random.sample(sorted(self.plan), scene.poisoned))
        self.busy_s, self.idle_s = 0.0, 0.0  # GPU-seconds of ready groups, while there was work
        self.idle_since: dict[WorkerId, float] = {}
        config = RunConfig.model_validate(
            {
                "groups": {"count": scene.groups},
                "encoders": {"count": scene.encoders, "batch_size": scene.batch},
                "decoders": {"count": scene.decoders} if scene.decoders else {"placement": "group"},
                "timeouts": {"stall_s": 3 * HEARTBEAT_S},
            }
        )
        run = resolve_run(config)
        plans = tuple(ParallelPlan(ulysses_degree=shape.ranks) for shape in self.mix)
        limits = replace(run, groups=GroupPlans(plans, {})).stage_limits({})
        self.scheduler = Scheduler(limits, retry_limits(config, scene.samples), config.timeouts.drain_s)
        decoders = run.max_workers[Stage.DECODE]
        for _ in range(scene.nodes + -(-(scene.encoders + decoders) // GROUP_GPUS)):
            self.join()
        for at in scene.joins:
            self.at(at, self.join)
        if scene.crash_every_s:
            self.at(self.random.expovariate(1 / scene.crash_every_s), self.crash)
        if scene.reclaim_every_s:
            self.at(self.random.expovariate(1 / scene.reclaim_every_s), self.reclaim)
        self.at(HEARTBEAT_S, self.tick)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (when, next(self.order), what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self.at(self.now + seconds, what)

    def run(self) -> Night:
        self.carry_out(self.scheduler.begin())
        self.process_events()
        while self.ended is None:
            self.now, _, what = heapq.heappop(self.heap)
            what()
            self.place()
            self.process_events()
        return self

    @property
    def idle_share(self) -> float:
        return self.idle_s / (self.busy_s + self.idle_s)

    @property
    def loss_share(self) -> float:
        return sum(self.lost.values()) / self.busy_s

    def process_events(self) -> None:
        while self.events and self.ended is None:
            self.carry_out(self.scheduler.step(self.events.popleft(), self.now))

    # Actions of the scheduler ---------------------------------------------------------------------------------------

    def carry_out(self, actions) -> None:
        for action in actions:
            match action:
                case Admit(wanted):
                    batch = [self.plan.popleft() for _ in range(min(wanted, len(self.plan)))]
                    self.events.extend(Admitted(key, size_class=self.shapes[key]) for key in batch)
                    if len(batch) < wanted:
                        self.events.append(PlanExhausted())
                case StartWorker(worker, size_class):
                    simulated = SimulatedWorker(
                        worker, self.mix[size_class].ranks if worker.stage is Stage.DENOISE else 1
                    )
                    self.workers[worker] = simulated
                    self.waiting.append(simulated)
                    self.room = True
                case KillWorker(worker, failure):
                    simulated = self.end(worker)
                    if simulated.keys and worker.stage is Stage.DENOISE:
                        self.lost[failure.kind] += simulated.gpus * (self.now - simulated.begun)
                case ReleaseWorker(worker):
                    assert not self.end(worker).keys
                case Run(worker, keys, stage):
                    self.begin_task(self.workers[worker], keys, stage)
                case Resized(Stage.DECODE, workers):
                    self.sizes.append(workers)
                case Quarantine(key, _):
                    self.quarantined.append(key)
                case Checkpoint():
                    pass
                case Abort(failure):
                    pytest.fail(failure.message)
                case Finish():
                    self.ended = self.now
        self.place()

    def end(self, worker: WorkerId) -> SimulatedWorker:
        simulated = self.workers.pop(worker)
        if simulated in self.waiting:
            self.waiting.remove(simulated)
        if simulated.node in self.free:
            self.free[simulated.node] += simulated.gpus
            self.room = True
        if worker in self.idle_since:
            self.idle_s += simulated.gpus * (self.now - self.idle_since.pop(worker)) if self.plan else 0.0
        return simulated

    def begin_task(self, simulated: SimulatedWorker, keys: tuple[str, ...], stage: Stage) -> None:
        scene = self.scene
        simulated.keys, simulated.begun = keys, self.now
        if simulated.id.stage is Stage.DENOISE:
            self.count_idle(simulated.id)
        denoise_s = self.mix[self.shapes[keys[0]]].denoise_s
        each = {Stage.ENCODE: scene.encode_s, Stage.DENOISE: denoise_s, Stage.DECODE: scene.decode_s}[stage]
        seconds = len(keys) * each * self.random.uniform(0.95, 1.05) + scene.turn_s
        self.after(seconds, lambda: self.end_task(simulated, keys, stage))

    def end_task(self, simulated: SimulatedWorker, keys: tuple[str, ...], stage: Stage) -> None:
        if self.workers.get(simulated.id) is not simulated or simulated.keys != keys:
            return
        simulated.keys = ()
        if simulated.id.stage is Stage.DENOISE:
            self.busy_s += simulated.gpus * (self.now - simulated.begun)
            self.idle_since[simulated.id] = self.now
        if stage is Stage.DENOISE:
            if keys[0] in self.bad:
                self.events.append(TaskFailed(simulated.id, Failure(FailureClass.POISON, "latents are not finite")))
                return
            self.denoised.update(keys)
        if stage is Stage.DECODE:
            self.committed.update(keys)
        self.events.append(TaskDone(simulated.id))

    def count_idle(self, worker: WorkerId) -> None:
        """Count idle time only while the plan has samples; at the tail, idle groups are expected."""
        idle_s = self.now - self.idle_since.pop(worker, self.now)
        self.idle_s += self.workers[worker].gpus * idle_s if self.plan else 0.0

    # Events of the cluster ------------------------------------------------------------------------------------------

    def place(self) -> None:
        if not (self.waiting and self.room):
            return
        self.room = False
        for simulated in list(self.waiting):
            fitting = [n for n, gpus in self.free.items() if gpus >= simulated.gpus and n not in self.draining]
            if fitting:
                simulated.node = min(fitting, key=lambda node: self.free[node])
                self.free[simulated.node] -= simulated.gpus
                self.waiting.remove(simulated)
                self.events.append(WorkerPlaced(simulated.id))
                self.after(self.scene.load_s, lambda simulated=simulated: self.loaded(simulated))

    def loaded(self, simulated: SimulatedWorker) -> None:
        if self.workers.get(simulated.id) is simulated:
            simulated.ready = True
            self.events.append(WorkerReady(simulated.id))
            if simulated.id.stage is Stage.DENOISE:
                self.idle_since[simulated.id] = self.now

    def tick(self) -> None:
        for simulated in self.workers.values():
            if simulated.keys:
                self.events.append(Heartbeat(simulated.id))
        self.events.append(Tick())
        self.after(HEARTBEAT_S if not self.draining else 5.0, self.tick)

    def join(self) -> None:
        self.free[next(self.node_ids)] = GROUP_GPUS
        self.room = True

    def crash(self) -> None:
        victims = [simulated for simulated in self.workers.values() if simulated.ready]
        if victims:
            worker = self.random.choice(victims).id
            self.events.append(WorkerLost(worker, Failure(FailureClass.INFRA, "died")))
        self.after(self.random.expovariate(1 / self.scene.crash_every_s), self.crash)

    def reclaim(self) -> None:
        nodes = [node for node in self.free if node not in self.draining]
        if nodes:
            node, notice_s = self.random.choice(nodes), self.random.choice([0.0, 120.0])
            if notice_s:
                self.draining.add(node)
                for simulated in [simulated for simulated in self.workers.values() if simulated.node == node]:
                    self.events.append(WorkerLeaving(simulated.id, self.now + notice_s))
            self.after(notice_s, lambda: self.take_away(node))
            self.after(self.random.uniform(300.0, 1800.0), self.join)
        self.after(self.random.expovariate(1 / self.scene.reclaim_every_s), self.reclaim)

    def take_away(self, node: int) -> None:
        del self.free[node]
        self.draining.discard(node)
        for simulated in [simulated for simulated in self.workers.values() if simulated.node == node]:
            self.events.append(WorkerLost(simulated.id, Failure(FailureClass.INFRA, "its node died")))


@pytest.mark.slow
def test_a_night_on_a_thousand_gpus():
    """P1, P4, P5: through crashes, poisoned samples, node losses with and without notice and joining nodes, with up to
    125 groups, each sample ends in one record, little work is lost, and groups are seldom idle.
    """
    scene = Scene(
        samples=2500,
        groups=125,
        encoders=6,
        decoders=26,
        nodes=100,
        poisoned=12,
        crash_every_s=600.0,
        reclaim_every_s=300.0,
        joins=tuple(600.0 * i for i in range(1, 26)),
    )
    night = Night(scene).run()
    assert sorted(night.quarantined) == sorted(night.bad)
    assert night.committed == Counter(f"s{i}" for i in range(scene.samples) if f"s{i}" not in night.bad)
    assert night.denoised == night.committed, "a completed denoise is never repeated"
    assert set(night.lost) == {FailureClass.INFRA, FailureClass.PREEMPTED}
    assert night.loss_share < 0.02, "about eighty half denoises of 2500 denoises"
    assert night.idle_share < 0.05


def test_a_night_of_groups_that_decode():
    """P1, P4, P5: without decoders, through crashes and node losses, no denoise is repeated and idle time is small."""
    scene = Scene(
        samples=600, groups=20, encoders=2, decoders=0, nodes=20, poisoned=4, crash_every_s=600.0, reclaim_every_s=900.0
    )
    night = Night(scene).run()
    assert sorted(night.quarantined) == sorted(night.bad)
    assert night.committed == night.denoised == Counter(f"s{i}" for i in range(600) if f"s{i}" not in night.bad)
    assert night.idle_share < 0.05


def test_groups_do_not_wait_for_work():
    """Design section 2: eight groups with 50-second denoises are idle for less than 2 % while there is work."""
    scene = Scene(samples=400, groups=8, encoders=1, decoders=2, nodes=8, denoise_s=50.0, decode_s=10.0)
    assert Night(scene).run().idle_share < 0.02


@pytest.mark.parametrize(("decode_s", "ideal"), [(60.0, 2), (169.0, 4), (473.0, 12)])
def test_an_auto_pool_finds_its_size(decode_s, ideal):
    """Pool sizing: with an `auto` pool of decoders, eight groups are idle for less than 2 % of the night. The pool
    finds the ideal size, or one more for headroom, and stays there.
    """
    scene = Scene(samples=800, groups=8, encoders=1, decoders="auto", nodes=8, decode_s=decode_s)
    night = Night(scene).run()
    assert night.idle_share < 0.02
    assert ideal <= night.sizes[-1] <= ideal + 1
    assert night.sizes == sorted(night.sizes)
    assert len(night.sizes) <= 2


def test_groups_make_room_for_decoders():
    """P33: groups that occupy the resources of the decoders do not wait for them all night."""
    scene = Scene(samples=600, groups=20, encoders=2, decoders=14, nodes=10, denoise_s=100.0, decode_s=60.0)
    night = Night(scene).run()
    assert len(night.committed) == scene.samples
    assert night.ended < 1.5 * (scene.load_s + scene.samples * scene.denoise_s / 10)


@pytest.mark.parametrize("seed", range(5))
def test_lost_nodes_never_leave_a_run_without_a_stage(seed):
    """P5, property: a run ends through any node losses, down to resources for hardly more than one group."""
    scene = Scene(samples=60, groups=4, encoders=2, decoders=3, nodes=2, reclaim_every_s=900.0, seed=seed)
    night = Night(scene).run()
    assert len(night.committed) + len(night.quarantined) == scene.samples
    assert len(night.quarantined) <= 1, "a sample on three lost nodes in a row"


def gpu_seconds(night):
    return sum(night.mix[shape].ranks * night.mix[shape].denoise_s for shape in night.shapes.values())


MIXES = {
    "halves": (4, (Shape(ranks=8, share=0.5, denoise_s=338.0), Shape(ranks=1, share=0.5, denoise_s=600.0))),
    "thirds": (
        4,
        (
            Shape(ranks=8, share=0.3, denoise_s=338.0),
            Shape(ranks=4, share=0.3, denoise_s=400.0),
            Shape(ranks=1, share=0.4, denoise_s=600.0),
        ),
    ),
    "in turn": (1, (Shape(ranks=8, share=0.5, denoise_s=338.0), Shape(ranks=1, share=0.5, denoise_s=600.0))),
}


@pytest.mark.parametrize(
    ("mix", "idle", "longer"), [("halves", 0.05, 1.2), ("thirds", 0.05, 1.2), ("in turn", 0.1, 1.4)]
)
def test_groups_of_several_sizes_share_a_night(mix, idle, longer):
    """P1, size classes: groups of several sizes are seldom idle, and the night takes hardly longer than its GPU
    seconds, also on one node, where a group of eight and eight groups of one alternate.
    """
    nodes, shapes = MIXES[mix]
    scene = Scene(
        samples=300, groups=nodes, encoders=1, decoders=4, nodes=nodes, decode_s=20.0, load_s=120.0, mix=shapes
    )
    night = Night(scene).run()
    assert len(night.committed) == scene.samples
    assert night.idle_share < idle
    assert night.ended < longer * gpu_seconds(night) / (8 * nodes) + 1800.0, "the tail, and the first load"


@pytest.mark.parametrize("seed", range(3))
def test_all_sizes_are_rendered_through_node_losses(seed):
    """P5, property: no size starves through node losses, down to resources for hardly more than one large group."""
    shapes = (Shape(ranks=8, share=0.2, denoise_s=338.0), Shape(ranks=1, share=0.8, denoise_s=600.0))
    scene = Scene(
        samples=80, groups=3, encoders=2, decoders=3, nodes=2, reclaim_every_s=1500.0, seed=seed, mix=shapes, poisoned=2
    )
    night = Night(scene).run()
    assert len(night.committed) + len(night.quarantined) == scene.samples
    assert len(night.quarantined) <= 4, "two poisoned samples, and samples on three lost nodes in a row"
