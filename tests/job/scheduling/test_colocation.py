"""Encoders on the GPUs of denoise groups: their number, the share that is left to the ranks, and when they stop."""

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
    """encoders.placement: colocated: one node of eight GPUs is enough; a rank gets the rest of its GPU."""
    run = resolve_run(config_of())
    assert minimum_resources(run) == [group_bundles(run, run.groups.largest)] == [[{"CPU": 8.0 + 1.0, "GPU": 8.0}]]
    assert run.rank_gpus == 0.8
    assert run.pools == {}
    assert [limit.is_colocated for limit in run.stage_limits({}).values()] == [True, False, False]


def test_one_node_of_eight_gpus_is_enough():
    """configs/720p_one_node.yaml: no actor needs a GPU besides the group's, and 720p fits."""
    config = load_config(str(CONFIGS / "720p_one_node.yaml"))
    assert [bundle["GPU"] for bundles in minimum_resources(resolve_run(config)) for bundle in bundles] == [8.0]
    assert problems_of(config, [(720, 1280, 129), (1280, 720, 129), (720, 1280, 1)]) == []
    assert problems_of(config.model_copy(update={"gpu_memory_gib": 47.0}), [(720, 1280, 129)]), "0.7 of it per rank"


POOLS = st.integers(1, 20) | st.just("auto")


@given(st.integers(1, 8), st.integers(1, 4), POOLS, st.integers(1, 2))
def test_every_colocated_encoder_finds_a_gpu(ranks, groups, encoders, nodes):
    """Property: a node holds at least one encoder and at most one per GPU; the run does not wait for more, even if
    encoders.count is higher.
    """
    run = resolve_run(config_of(ranks * nodes, groups, encoders, nodes))
    on_node = run.colocated_per_node
    assert 1 <= on_node <= ranks
    wanted = groups if encoders == "auto" else encoders
    assert run.max_workers[Stage.ENCODE] == min(wanted, groups * nodes * on_node)


@pytest.mark.parametrize("override", ["encoders.gpus=0.5", "encoders.gpus=1", "groups.gpus_per_rank=0.9"])
def test_shares_that_let_two_ranks_share_a_gpu_are_refused(tmp_path, override):
    """P6: NCCL requires a GPU per rank, and Ray places two ranks of half a GPU each on one."""
    path = tmp_path / "config.yaml"
    path.write_text("parallel: {ulysses_degree: 1}\nencoders: {placement: colocated, gpus: 0.49}\n")
    assert load_config(str(path))
    with pytest.raises(UserError, match=r"encoders.gpus = .* colocated with .* less than 0.5"):
        load_config(str(path), [override])


# The scheduler -------------------------------------------------------------------------------------


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


# Start and stop ------------------------------------------------------------------------------------------------------


class FakeWorker:
    """A worker that reports the events of the test."""

    def __init__(self, watch):
        self.nodes = frozenset({"node"})
        self.report = lambda event: watch("ref", lambda _: [event])
        self.killed = False

    def poll(self, now):
        return []

    def kill(self, *, rebuild=False):
        self.killed = True


class OneReservation:
    """A reservation, its pool, and one colocated encoder."""

    def __init__(self, room=True):
        self.reservation = SimpleNamespace(occupied=True, given_back=False)
        self.room = SimpleNamespace(reservation=self.reservation, leave=lambda: setattr(self, "left", True))
        self.events, self.left, self.worker = [], False, None
        self.has_room = room
        pool = SimpleNamespace(find_room=lambda: self.room if self.has_room else None)
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
    """It starts in the first bundle with room, and does nothing before."""
    scene = OneReservation(room=False)
    assert scene.colocated_worker.poll(0.0) == []
    assert scene.worker is None
    scene.colocated_worker.kill()
    scene.has_room = True
    scene.colocated_worker.poll(1.0)
    scene.worker.report(WorkerPlaced(WORKER))
    assert scene.events == [WorkerPlaced(WORKER)]
    assert scene.colocated_worker.nodes == {"node"}


def test_an_encoder_stays_while_its_group_is_rebuilt():
    """P5: a lost group does not stop the encoder on its GPUs."""
    scene = OneReservation()
    scene.worker.report(WorkerPlaced(WORKER))
    scene.reservation.occupied = False
    scene.worker.report(TaskDone(WORKER))
    assert scene.colocated_worker.poll(0.0) == []
    assert scene.events[1:] == [TaskDone(WORKER)]


@pytest.mark.parametrize("when", ["before it is placed", "as it is placed"])
def test_an_encoder_that_starts_while_the_ranks_are_rebuilt_is_released(when):
    """Ray could have given it the share of a rank, which then could not be placed."""
    scene = OneReservation()
    scene.reservation.occupied = False
    if when == "as it is placed":
        scene.worker.report(WorkerPlaced(WORKER))
        assert preempted(scene.events)
    else:
        assert preempted(scene.colocated_worker.poll(0.0))
    scene.colocated_worker.kill()
    assert scene.worker.killed
    assert scene.left


def test_an_encoder_stops_after_its_task_when_the_placement_group_is_released():
    """P5: it gets no further task, and its loss counts as PREEMPTED, whatever the error is."""
    scene = OneReservation()
    scene.worker.report(WorkerPlaced(WORKER))
    scene.reservation.occupied, scene.reservation.given_back = False, True
    assert scene.colocated_worker.poll(0.0) == [WorkerLeaving(WORKER, math.inf)]
    scene.worker.report(WorkerLost(WORKER, Failure(FailureClass.INFRA, "died")))
    assert preempted(scene.events[1:])
