"""The seats of lost groups, on a real Ray: kept for the next life, and given back when there is none (P4, P5)."""

from __future__ import annotations

import time

import pytest
import ray

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan
from hv_batch.runtime.groups.reservation_pool import KEEP_S, ReservationPool
from hv_batch.runtime.nodes.exclusion import NodeExclusion

RUN = resolve_run(
    RunConfig.model_validate({"parallel": {"device": "cpu", "ulysses_degree": 2}, "groups": {"cpus_per_rank": 0.0}})
)
PAIR, ALONE = ParallelPlan(ulysses_degree=2), ParallelPlan()
FIRST, SECOND = (WorkerId(Stage.DENOISE, slot, 0) for slot in range(2))


@pytest.fixture
def pool(fleet):
    """Of a run's groups of two GPUs, on a cluster with room for one; all that it keeps ends with the connection."""
    fleet.add_node(gpus=2)
    ray.init(address=fleet.address, log_to_driver=False, logging_level="ERROR")
    yield ReservationPool(RUN, NodeExclusion(RUN))
    ray.shutdown()


def placed(reservation):
    ray.get(reservation.ready(), timeout=60)
    return reservation


def test_seats_wait_for_the_next_group_and_for_nobody_else(pool):
    """P4, P5: the rebuilt group gets what it had; who cannot be given work does not keep GPUs from others."""
    reservation = placed(pool.reservation(FIRST, PAIR))
    pool.keep(reservation)
    long_after = time.monotonic() + 2 * KEEP_S
    pool.give_back(groups_to_come={PAIR: 1, ALONE: 0}, now=long_after)
    assert pool.reservation(FIRST, PAIR) is reservation
    pool.keep(reservation)
    pool.give_back(groups_to_come={PAIR: 0, ALONE: 1}, now=time.monotonic())
    other = pool.reservation(SECOND, PAIR)
    assert other is reservation, "a retry may first need its encoder again, so they are not given back at once"
    pool.keep(reservation)
    pool.waits(SECOND, reservation, long_after)
    pool.give_back(groups_to_come={PAIR: 0, ALONE: 1}, now=long_after)
    pool.ended(SECOND)
    assert not pool.worth_keeping(reservation), "whoever waits for room may have them"
    pool.give_back(groups_to_come={PAIR: 0, ALONE: 1}, now=long_after)
    assert placed(pool.reservation(SECOND, PAIR)) is not reservation


def test_a_node_that_does_not_answer_gets_no_rebuild(pool, fleet):
    """P4: Ray believes a node alive for a while after its power is cut; a life there would be lost at once."""
    reservation = placed(pool.reservation(FIRST, PAIR))
    assert reservation.answer()
    pool.keep(reservation)
    fleet.kill_node(fleet.nodes[0])
    assert not reservation.answer()
    assert pool.reservation(FIRST, PAIR) is not reservation
