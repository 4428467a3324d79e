"""Colocated encoders: their number, their share of the groups' GPUs, and when they stop."""

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
COLOCATED = {"placement": "colocated", "gpus": 0.2}


def config_of(ranks=8, groups=1, encoders=1, nodes=1):
    return RunConfig.model_validate(
        {
            "parallel": {"ulysses_degree": 1, "ring_degree": ranks},
            "groups": {"count": groups, "nodes_per_group": nodes},
            "encoders": {"count": encoders, **COLOCATED},
            "decoders": {"placement": "group"},
        }
    )


# Number and resources -------------------------------------------------------------------------------------------------


def problems_of(config, shapes):
    return memory_problems(resolve_run(config, shapes))


def test_a_group_reserves_the_resources_of_its_encoders():
    """encoders.placement: colocated: the group's bundles include the encoders, and a rank gets the rest of its GPU."""
    run = resolve_run(config_of())
    assert minimum_resources(run) == [group_bundles(run, run.groups.largest)] == [[{"CPU": 8.0 + 1.0, "GPU": 8.0}]]
    assert run.rank_gpus == 0.8
    assert run.pools == {}
    assert [limit.is_colocated for limit in run.stage_limits({}).values()] == [True, False, False]


def test_one_node_of_eight_gpus_is_enough():
    """configs/720p_one_node.yaml: the group needs no further resources, and 720p fits into its memory."""
    config = load_config(str(CONFIGS / "720p_one_node.yaml"))
    assert [bundle["GPU"] for bundles in minimum_resources(resolve_run(config)) for bundle in bundles] == [8.0]
    assert problems_of(config, [(720, 1280, 129), (1280, 720, 129), (720, 1280, 1)]) == []
    assert problems_of(config.model_copy(update={"gpu_memory_gib": 47.0}), [(720, 1280, 129)]), (
        "0.7 of the memory is too little"
    )


POOLS = st.integers(1, 20) | st.just("auto")


@given(st.integers(1, 8), st.integers(1, 4), POOLS, st.integers(1, 2))
def test_every_colocated_encoder_finds_a_gpu(ranks, groups, encoders, nodes):
    """Property: a node holds at least one encoder and at most one for each GPU, and the run needs no more encoders than
    that.
    """
    run = resolve_run(config_of(ranks * nodes, groups, encoders, nodes))
    on_node = run.colocated_per_node
    assert 1 <= on_node <= ranks
    wanted = groups if encoders == "auto" else encoders
    assert run.max_workers[Stage.ENCODE] == min(wanted, groups * nodes * on_node)


@pytest.mark.parametrize("override", ["encoders.gpus=0.5", "encoders.gpus=1", "groups.gpus_per_rank=0.9"])
def test_shares_that_allow_two_ranks_on_a_gpu_are_rejected(tmp_path, override):
    """P6: NCCL needs one GPU for each rank, and Ray would place two ranks of half a GPU each onto one."""
    path = tmp_path / "config.yaml"
    path.write_text("parallel: {ulysses_degree: 1}\nencoders: {placement: colocated, gpus: 0.49}\n")
    assert load_config(str(path))
    with pytest.raises(UserError, match=r"encoders.gpus = .* colocated with .* less than 0.5"):
        load_config(str(path), [override])


# With the scheduler --------------------------------------------------------------------------------------------------


def test_groups_do_not_wait_for_colocated_encoders():
    """Scaling: colocated encoders need no resources of their own, so the second group is requested without them."""
    world = World(limits(groups=3, decoders=0, colocated=True), plan_of(7), has_room=False)
    world.feed(WorkerPlaced(world.starting[0]))
    assert sum(worker.stage is Stage.DENOISE for worker in world.starting) == 3
    world.has_room = True
    world.run_to_end()
    assert len(world.committed) == 7


def test_stored_latents_need_no_group_for_pool_decoders():
    """P4: a resume with nothing left to denoise starts decoders alone, even if the encoders are colocated."""
    world = World(limits(groups=2, colocated=True), plan_of(1, Stage.DECODE))
    assert [worker.stage for worker in world.starting] == [Stage.DECODE]
    world.run_to_end()
    assert world.committed == ["s0"]


# One worker -----------------------------------------------------------------------------------------------------------


class FakeWorker:
    """A driver-side worker whose events are sent by the test."""

    def __init__(self, watch):
        self.nodes = frozenset({"node"})
        self.send = lambda event: watch("ref", lambda _: [event])
        self.killed = False

    def poll(self, now):
        return []

    def kill(self, *, rebuild=False):
        self.killed = True


class Setup:
    """A group reservation with one bundle slot, its pool, and one colocated encoder."""

    def __init__(self, has_slot=True):
        self.reservation = SimpleNamespace(is_occupied=True, is_released=False)
        self.room = SimpleNamespace(reservation=self.reservation, leave=lambda: setattr(self, "left", True))
        self.events, self.left, self.worker = [], False, None
        self.has_slot = has_slot
        pool = SimpleNamespace(find_slot=lambda: self.room if self.has_slot else None)
        self.colocated_worker = ColocatedWorker(
            WORKER, pool, lambda ref, then: self.events.extend(then(ref)), self.begin
        )

    def begin(self, _room, watch):
        self.worker = FakeWorker(watch)
        return self.worker


def preempted(events):
    (event,) = events
    return isinstance(event, WorkerLost) and event.failure.kind is FailureClass.PREEMPTED


def test_an_encoder_waits_for_a_group():
    """The encoder starts in the first free bundle slot, and does nothing before."""
    setup = Setup(has_slot=False)
    assert setup.colocated_worker.poll(0.0) == []
    assert setup.worker is None
    setup.colocated_worker.kill()
    setup.has_slot = True
    setup.colocated_worker.poll(1.0)
    setup.worker.send(WorkerPlaced(WORKER))
    assert setup.events == [WorkerPlaced(WORKER)]
    assert setup.colocated_worker.nodes == {"node"}


def test_an_encoder_stays_while_its_group_is_rebuilt():
    """P5: a lost group does not stop the encoder on its GPUs."""
    setup = Setup()
    setup.worker.send(WorkerPlaced(WORKER))
    setup.reservation.is_occupied = False
    setup.worker.send(TaskDone(WORKER))
    assert setup.colocated_worker.poll(0.0) == []
    assert setup.events[1:] == [TaskDone(WORKER)]


@pytest.mark.parametrize("when", ["before it is placed", "as it is placed"])
def test_an_encoder_that_is_placed_while_the_ranks_are_absent_ends(when):
    """Ray may have given it the share of a rank, which could then not be placed."""
    setup = Setup()
    setup.reservation.is_occupied = False
    if when == "as it is placed":
        setup.worker.send(WorkerPlaced(WORKER))
        assert preempted(setup.events)
    else:
        assert preempted(setup.colocated_worker.poll(0.0))
    setup.colocated_worker.kill()
    assert setup.worker.killed
    assert setup.left


def test_an_encoder_stops_after_its_task_when_the_placement_group_is_released():
    """P5: the encoder gets no further task, and its loss is PREEMPTED, whatever failure it reports."""
    setup = Setup()
    setup.worker.send(WorkerPlaced(WORKER))
    setup.reservation.is_occupied, setup.reservation.is_released = False, True
    assert setup.colocated_worker.poll(0.0) == [WorkerLeaving(WORKER, math.inf)]
    setup.worker.send(WorkerLost(WORKER, Failure(FailureClass.INFRA, "died")))
    assert preempted(setup.events[1:])
