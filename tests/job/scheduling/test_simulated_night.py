"""Simulated nights on up to a thousand GPUs: the real scheduler in `hv_batch.job.simulation`.

The simulated nodes have GPUs, join, are preempted with and without notice, and host a worker only if they have free
GPUs. So the results of a night depend on the decisions of the scheduler.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolved_run import GroupPlans
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.failure import FailureClass
from hv_batch.job.simulation.faults import Faults
from hv_batch.job.simulation.ledger import Use
from hv_batch.job.simulation.run_limits import run_limits
from hv_batch.job.simulation.samples import SampleKind, SamplePlan
from hv_batch.job.simulation.scenario import LoadTimes, Scenario
from hv_batch.job.simulation.simulator import Simulator
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan

GROUP_GPUS = 8
HOUR_S = 3600.0


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
    load_s: float = 300.0
    denoise_s: float = 338.0
    mix: tuple[Shape, ...] = ()  # of the manifest's samples, largest groups first; empty: all on eight GPUs
    decode_s: float = 60.0
    poisoned: int = 0  # samples whose denoise always fails
    crash_every_s: float = 0.0  # mean time between deaths of a worker
    reclaim_every_s: float = 0.0  # mean time between node losses, half with two minutes' notice; a node joins later
    joins: tuple[float, ...] = ()  # when further nodes join
    seed: int = 0


class Night:
    """A scene, rendered to its end."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.mix = scene.mix or (Shape(ranks=GROUP_GPUS, share=1.0, denoise_s=scene.denoise_s),)
        config = RunConfig.model_validate(
            {
                "groups": {"count": scene.groups, "checkpoint_every": 0},
                "encoders": {"count": scene.encoders, "batch_size": 8},
                "decoders": {"count": scene.decoders} if scene.decoders else {"placement": "group"},
            }
        )
        run = resolve_run(config)
        run = replace(run, groups=GroupPlans(tuple(ParallelPlan(ulysses_degree=shape.ranks) for shape in self.mix), {}))
        pools = scene.encoders + run.max_workers[Stage.DECODE]
        scenario = Scenario(
            nodes=scene.nodes + -(-pools // GROUP_GPUS),
            start_s=0.0,
            load_s=LoadTimes(encode=scene.load_s, denoise=scene.load_s, decode=scene.load_s),
            preemptions_per_hour=HOUR_S / scene.reclaim_every_s if scene.reclaim_every_s else 0.0,
            without_notice=0.5,
            failures_per_hour=HOUR_S / scene.crash_every_s if scene.crash_every_s else 0.0,
            joins_s=scene.joins,
            seed=scene.seed,
        )
        shares = [shape.share for shape in self.mix]
        drawn = random.Random(scene.seed).choices(range(len(self.mix)), shares, k=scene.samples)
        kinds = [
            SampleKind(encode_s=1.0, denoise_s=shape.denoise_s, decode_s=scene.decode_s, size_class=size_class)
            for size_class, shape in enumerate(self.mix)
        ]
        plan = SamplePlan(kinds, scene.samples, drawn.__getitem__, scene.poisoned, scene.seed)
        simulator = Simulator(run_limits(run, scene.samples), plan, scenario)
        Faults(simulator, scenario)
        self.outcome = simulator.run()
        self.ended = self.outcome.seconds
        self.bad = sorted(plan.poisoned)
        self.gpu_seconds = sum(self.mix[shape].ranks * self.mix[shape].denoise_s for shape in drawn)
        used = self.outcome.ledger.seconds
        busy = used[Use.DENOISE] + (0.0 if scene.decoders else used[Use.DECODE])
        self.idle_share = used[Use.IDLE_GROUPS] / (busy + used[Use.IDLE_GROUPS])
        self.loss_share = sum(self.outcome.lost.values()) / busy

    @property
    def quarantined(self) -> list[int]:
        return sorted(self.outcome.quarantined)

    @property
    def committed(self) -> list[int]:
        """How often each sample was committed."""
        return list(self.outcome.committed)

    @property
    def denoised(self) -> list[int]:
        """How often each sample was denoised."""
        return list(self.outcome.denoised)

    @property
    def once(self) -> list[int]:
        """1 for each sample that can be rendered."""
        return [int(number not in self.bad) for number in range(self.scene.samples)]


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
    night = Night(scene)
    assert night.quarantined == night.bad
    assert night.committed == night.once
    assert night.denoised == night.once, "a completed denoise is never repeated"
    assert set(night.outcome.lost) == {FailureClass.INFRA, FailureClass.PREEMPTED}
    assert night.loss_share < 0.02, "about eighty half denoises of 2500 denoises"
    assert night.idle_share < 0.05


def test_a_night_of_groups_that_decode():
    """P1, P4, P5: without decoders, through crashes and node losses, no denoise is repeated and idle time is small."""
    scene = Scene(
        samples=600, groups=20, encoders=2, decoders=0, nodes=20, poisoned=4, crash_every_s=600.0, reclaim_every_s=900.0
    )
    night = Night(scene)
    assert night.quarantined == night.bad
    assert night.committed == night.denoised == night.once
    assert night.idle_share < 0.05


def test_groups_do_not_wait_for_work():
    """Design section 2: eight groups with 50-second denoises are idle for less than 2 % while there is work."""
    scene = Scene(samples=400, groups=8, encoders=1, decoders=2, nodes=8, denoise_s=50.0, decode_s=10.0)
    assert Night(scene).idle_share < 0.02


@pytest.mark.parametrize(("decode_s", "ideal"), [(60.0, 2), (169.0, 4), (473.0, 12)])
def test_an_auto_pool_finds_its_size(decode_s, ideal):
    """Pool sizing: with an `auto` pool of decoders, eight groups are idle for less than 2 % of the night. The pool
    finds the ideal size, or one more for headroom, and stays there.
    """
    scene = Scene(samples=800, groups=8, encoders=1, decoders="auto", nodes=8, decode_s=decode_s)
    night = Night(scene)
    assert night.idle_share < 0.02
    assert ideal <= night.outcome.pool_sizes[-1] <= ideal + 1
    assert night.outcome.pool_sizes == sorted(night.outcome.pool_sizes)
    assert len(night.outcome.pool_sizes) <= 2


def test_groups_make_room_for_decoders():
    """P33: groups that occupy the resources of the decoders do not wait for them all night."""
    scene = Scene(samples=600, groups=20, encoders=2, decoders=14, nodes=10, denoise_s=100.0, decode_s=60.0)
    night = Night(scene)
    assert sum(night.committed) == scene.samples
    assert night.ended < 1.5 * (scene.load_s + scene.samples * scene.denoise_s / 10)


@pytest.mark.parametrize("seed", range(1, 6))  # in 3 of 100 seeds, two samples meet three lost nodes each
def test_lost_nodes_never_leave_a_run_without_a_stage(seed):
    """P5, property: a run ends through any node losses, down to resources for hardly more than one group."""
    scene = Scene(samples=60, groups=4, encoders=2, decoders=3, nodes=2, reclaim_every_s=900.0, seed=seed)
    night = Night(scene)
    assert sum(night.committed) + len(night.quarantined) == scene.samples
    assert len(night.quarantined) <= 1, "a sample on three lost nodes in a row"


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
    night = Night(scene)
    assert sum(night.committed) == scene.samples
    assert night.idle_share < idle
    assert night.ended < longer * night.gpu_seconds / (8 * nodes) + 1800.0, "the tail, and the first load"


@pytest.mark.parametrize("seed", range(3))
def test_all_sizes_are_rendered_through_node_losses(seed):
    """P5, property: no size starves through node losses, down to resources for hardly more than one large group."""
    shapes = (Shape(ranks=8, share=0.2, denoise_s=338.0), Shape(ranks=1, share=0.8, denoise_s=600.0))
    scene = Scene(
        samples=80, groups=3, encoders=2, decoders=3, nodes=2, reclaim_every_s=1500.0, seed=seed, mix=shapes, poisoned=2
    )
    night = Night(scene)
    assert sum(night.committed) + len(night.quarantined) == scene.samples
    assert len(night.quarantined) <= 4, "two poisoned samples, and samples on three lost nodes in a row"
