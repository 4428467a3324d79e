"""Reservations of lost groups, on a real Ray: retained for the next group, released if there is none (P4, P5)."""

from __future__ import annotations

import time

import pytest
import ray

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan
from hv_batch.runtime.groups.reservation import all_answer
from hv_batch.runtime.groups.reservation_pool import RETAIN_S, ReservationPool
from hv_batch.runtime.nodes.cluster_view import ClusterView
from hv_batch.runtime.nodes.exclusion import NodeExclusion

RUN = resolve_run(
    RunConfig.model_validate({"parallel": {"device": "cpu", "ulysses_degree": 2}, "groups": {"cpus_per_rank": 0.0}})
)
PAIR, ALONE = ParallelPlan(ulysses_degree=2), ParallelPlan()
FIRST, SECOND = (WorkerId(Stage.DENOISE, slot, 0) for slot in range(2))


@pytest.fixture
def pool(fleet):
    """The pool of a run with groups of two GPUs, on a cluster with room for one. Its probes run at once.

    The end of the connection releases all reservations.
    """
    fleet.add_node(gpus=2)
    ray.init(address=fleet.address, log_to_driver=False, logging_level="ERROR")
    cluster = ClusterView()
    yield ReservationPool(RUN, NodeExclusion(RUN, cluster), cluster, lambda probe, then: then(probe()))
    cluster.close()
    ray.shutdown()


def request(pool, worker):
    granted = []
    pool.request(worker, PAIR, granted.append)
    (reservation,) = granted
    return reservation


def placed(reservation):
    ray.get(reservation.ready(), timeout=60)
    reservation.note_placed()
    return reservation


@pytest.mark.slow
def test_a_reservation_is_retained_for_the_next_group_only(pool):
    """P4, P5: the rebuilt group gets what it had; a group that will not be started keeps no GPUs from others."""
    reservation = placed(request(pool, FIRST))
    pool.retain(reservation)
    long_after = time.monotonic() + 2 * RETAIN_S
    pool.release_unused(groups_to_come={PAIR: 1, ALONE: 0}, now=long_after)
    assert request(pool, FIRST) is reservation
    pool.retain(reservation)
    pool.release_unused(groups_to_come={PAIR: 0, ALONE: 1}, now=time.monotonic())
    other = request(pool, SECOND)
    assert other is reservation, "a retry may first need its encoder again, so it is not released at once"
    pool.retain(reservation)
    pool.waits(SECOND, reservation, long_after)
    pool.release_unused(groups_to_come={PAIR: 0, ALONE: 1}, now=long_after)
    pool.ended(SECOND)
    assert not pool.is_worth_waiting_for(reservation), "a group that waits may have it"
    pool.release_unused(groups_to_come={PAIR: 0, ALONE: 1}, now=long_after)
    assert placed(request(pool, SECOND)) is not reservation


@pytest.mark.slow
def test_a_node_that_does_not_answer_gets_no_rebuild(pool, fleet):
    """P4: Ray lists a node as alive for a while after its power is cut; a group there would be lost at once."""
    reservation = placed(request(pool, FIRST))
    assert all_answer(reservation.addresses())
    pool.retain(reservation)
    fleet.kill_node(fleet.nodes[0])
    assert not all_answer(reservation.addresses())
    assert request(pool, FIRST) is not reservation
