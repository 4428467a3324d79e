"""Encoders on the GPUs of denoise groups: how many there are, what they leave to the ranks, and when they stop."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.cost_model.memory_check import memory_problems
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import TaskDone, WorkerId, WorkerLeaving, WorkerLost, WorkerPlaced
from hv_batch.job.stages import Stage
from hv_batch.protocol import UserError
from hv_batch.runtime.nodes.resources import group_bundles, minimum_resources
from hv_batch.runtime.pools.colocated_worker import ColocatedWorker
from tests.support.repository import CONFIGS
from tests.support.scheduler_world import World, limits, plan_of

WORKER = WorkerId(Stage.ENCODE, 0, 0)
LODGING = {"placement": "colocated", "gpus": 0.2}


def config_of(ranks=8, groups=1, encoders=1, nodes=1):
    return RunConfig.model_validate(
        {
            "parallel": {"ulysses_degree": 1, "ring_degree": ranks},
            "groups": {"count": groups, "nodes_per_group": nodes},
            "encoders": {"count": encoders, **LODGING},
            "decoders": {"placement": "group"},
        }
    )


# How many, and where --------------------------------------------------------------------------------------------------


def problems_of(config, shapes):
    return memory_problems(resolve_run(config, shapes))


def test_a_group_reserves_the_resources_of_its_encoders():
    """encoders.placement: colocated: one node of eight GPUs renders; a rank gets the rest of its GPU."""
    run = resolve_run(config_of())
    assert minimum_resources(run) == [group_bundles(run, run.groups.largest)] == [[{"CPU": 8.0 + 1.0, "GPU": 8.0}]]
    assert run.rank_gpus == 0.8
    assert run.pools == {}
    assert [limit.is_colocated for limit in run.stage_limits({}).values()] == [True, False, False]


def test_one_node_of_eight_gpus_is_enough():
    """configs/720p_one_node.yaml: nothing stands beside the group, and 720p fits."""
    config = load_config(str(CONFIGS / "720p_one_node.yaml"))
    assert [bundle["GPU"] for bundles in minimum_resources(resolve_run(config)) for bundle in bundles] == [8.0]
    assert problems_of(config, [(720, 1280, 129), (1280, 720, 129), (720, 1280, 1)]) == []
    assert problems_of(config.model_copy(update={"gpu_memory_gib": 47.0}), [(720, 1280, 129)]), "by 0.7 of it"


POOLS = st.integers(1, 20) | st.just("auto")


@given(st.integers(1, 8), st.integers(1, 4), POOLS, st.integers(1, 2))
def test_every_colocated_encoder_finds_a_gpu(ranks, groups, encoders, nodes):
    """Property: a node holds at least one encoder and at most one for each GPU; the run does not wait for the rest of
    encoders.count.
    """
    run = resolve_run(config_of(ranks * nodes, groups, encoders, nodes))
    on_node = run.colocated_per_node
    assert 1 <= on_node <= ranks
    wanted = groups if encoders == "auto" else encoders
    assert run.max_workers[Stage.ENCODE] == min(wanted, groups * nodes * on_node)


@pytest.mark.parametrize("override", ["encoders.gpus=0.5", "encoders.gpus=1", "groups.gpus_per_rank=0.9"])
def test_shares_that_let_two_ranks_meet_on_a_gpu_are_refused(tmp_path, override):
    """P6: NCCL wants a GPU a rank, and Ray puts two ranks of half a GPU each onto one."""
    path = tmp_path / "config.yaml"
    path.write_text("parallel: {ulysses_degree: 1}\nencoders: {placement: colocated, gpus: 0.49}\n")
    assert load_config(str(path))
    with pytest.raises(UserError, match=r"encoders.gpus = .* colocated with .* less than 0.5"):
        load_config(str(path), [override])


# What the scheduler does about it -------------------------------------------------------------------------------------


def test_groups_do_not_wait_for_colocated_encoders():
    """Elastic: colocated encoders need no resources of their own, so the second group is requested without them."""
    world = World(limits(groups=3, decoders=0, colocated=True), plan_of(7), has_room=False)
    world.feed(WorkerPlaced(world.starting[0]))
    assert sum(worker.stage is Stage.DENOISE for worker in world.starting) == 3
    world.has_room = True
    world.calm_down()
    assert len(world.committed) == 7


def test_stored_latents_need_no_group_for_pool_decoders():
    """P4: a resume with nothing left to denoise starts decoders alone, even if the encoders are colocated."""
    world = World(limits(groups=2, colocated=True), plan_of(1, Stage.DECODE))
    assert [worker.stage for worker in world.starting] == [Stage.DECODE]
    world.calm_down()
    assert world.committed == ["s0"]


# The life of one ------------------------------------------------------------------------------------------------------


class Life:
    """An actor's driver side, that hears what a test tells it."""

    def __init__(self, watch):
        self.nodes = frozenset({"node"})
        self.tell = lambda event: watch("ref", lambda _: [event])
        self.killed = False

    def poll(self, now):
        return []

    def kill(self, *, rebuild=False):
        self.killed = True


class House:
    """Seats, a pool that holds them, and one colocated encoder."""

    def __init__(self, room=True):
        self.reservation = SimpleNamespace(is_occupied=True, is_released=False)
        self.room = SimpleNamespace(reservation=self.reservation, leave=lambda: setattr(self, "left", True))
        self.heard, self.left, self.life = [], False, None
        self.has_room = room
        pool = SimpleNamespace(find_slot=lambda: self.room if self.has_room else None)
        self.colocated_worker = ColocatedWorker(
            WORKER, pool, lambda ref, then: self.heard.extend(then(ref)), self.begin
        )

    def begin(self, _room, watch):
        self.life = Life(watch)
        return self.life


def preempted(events):
    (event,) = events
    return isinstance(event, WorkerLost) and event.failure.kind is FailureClass.PREEMPTED


def test_an_encoder_waits_for_a_group():
    """It starts in the first room that there is, and does nothing before."""
    house = House(room=False)
    assert house.colocated_worker.poll(0.0) == []
    assert house.life is None
    house.colocated_worker.kill()
    house.has_room = True
    house.colocated_worker.poll(1.0)
    house.life.tell(WorkerPlaced(WORKER))
    assert house.heard == [WorkerPlaced(WORKER)]
    assert house.colocated_worker.nodes == {"node"}


def test_an_encoder_stays_while_its_group_is_rebuilt():
    """P5: a lost group does not stop the encoder on its GPUs."""
    house = House()
    house.life.tell(WorkerPlaced(WORKER))
    house.reservation.is_occupied = False
    house.life.tell(TaskDone(WORKER))
    assert house.colocated_worker.poll(0.0) == []
    assert house.heard[1:] == [TaskDone(WORKER)]


@pytest.mark.parametrize("when", ["before it is placed", "as it is placed"])
def test_who_comes_while_the_ranks_are_away_is_turned_out(when):
    """Ray could have given it the share of a rank, which then would find no place."""
    house = House()
    house.reservation.is_occupied = False
    if when == "as it is placed":
        house.life.tell(WorkerPlaced(WORKER))
        assert preempted(house.heard)
    else:
        assert preempted(house.colocated_worker.poll(0.0))
    house.colocated_worker.kill()
    assert house.life.killed
    assert house.left


def test_an_encoder_stops_after_its_task_when_the_placement_group_is_released():
    """P5: it gets no further task; what becomes of it then is PREEMPTED, whatever its end looks like."""
    house = House()
    house.life.tell(WorkerPlaced(WORKER))
    house.reservation.is_occupied, house.reservation.is_released = False, True
    assert house.colocated_worker.poll(0.0) == [WorkerLeaving(WORKER, math.inf)]
    house.life.tell(WorkerLost(WORKER, Failure(FailureClass.INFRA, "died")))
    assert preempted(house.heard[1:])
