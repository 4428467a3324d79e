"""The share of a cluster that the groups of a run may use (`groups.max_share`)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.runtime.groups import reservation_pool
from hv_batch.runtime.groups.group_share import GroupShare
from hv_batch.runtime.groups.reservation_pool import ReservationPool


def run_of(share, ranks=2, **groups):
    sections = {"parallel": {"gpus_per_group": ranks}, "encoders": {"gpus": 0.25}, "decoders": {"gpus": 0.75}}
    return resolve_run(RunConfig.model_validate({**sections, "groups": {"max_share": share, "count": 64, **groups}}))


def nodes_of(*gpus):
    return [{"GPU": float(count), "CPU": 64.0} for count in gpus]


@given(st.floats(0.05, 1.0), st.sampled_from([1, 2, 4, 8]), st.lists(st.integers(1, 8), max_size=8))
def test_groups_and_pools_never_exceed_the_share_but_one_group_always_runs(share, ranks, gpus):
    run = run_of(share, ranks)
    bound, nodes, held = GroupShare(run), nodes_of(*gpus), []
    while bound.admits(run.groups.largest, held, nodes):
        held.append(run.groups.largest)
    assert len(held) >= 1
    used = ranks * len(held) + 1.0
    assert len(held) == 1 or used <= share * sum(gpus) + 1e-6
    assert used + ranks > share * sum(gpus) - 1e-6, "and it uses what it may"


@pytest.mark.parametrize("value", [0, -0.5, 1.5])
def test_a_share_is_above_0_and_at_most_1(value):
    with pytest.raises(ValidationError, match="max_share"):
        RunConfig.model_validate({"groups": {"max_share": value}})


def test_a_run_without_a_share_is_written_as_before():
    """So that older versions read its run.json."""
    assert "max_share" not in RunConfig().model_dump()["groups"]
    assert RunConfig.model_validate({"groups": {"max_share": 0.5}}).model_dump()["groups"]["max_share"] == 0.5


class Pool:
    """A pool on a cluster without Ray. `granted` are the slots that have a reservation, in order."""

    def __init__(self, monkeypatch, share, *gpus):
        monkeypatch.setattr(reservation_pool, "GroupReservation", self._reserve)
        self.nodes = nodes_of(*gpus)
        self.run = run_of(share)
        self.granted, self.reservations = [], []
        cluster = SimpleNamespace(alive=lambda: dict(enumerate(self.nodes)))
        self.pool = ReservationPool(self.run, SimpleNamespace(avoided=lambda _: frozenset()), cluster, None)

    def _reserve(self, _run, plan, _name, _avoid, _cluster):
        self.reservations.append(SimpleNamespace(plan=plan, is_released=False))
        return self.reservations[-1]

    def request(self, slot):
        self.pool.request(
            WorkerId(Stage.DENOISE, slot, 0), self.run.groups.largest, lambda _: self.granted.append(slot)
        )


def test_groups_beyond_the_share_wait_in_order_until_there_is_room(monkeypatch, caplog):
    """Half of 14 GPUs, less one for encoder and decoder, is room for three groups of two."""
    caplog.set_level("INFO")
    pool = Pool(monkeypatch, 0.5, 8, 6)
    for slot in range(6):
        pool.request(slot)
    assert (pool.granted, pool.pool.deferred) == ([0, 1, 2], 3)
    assert caplog.text.count("groups.max_share = 0.5 allows this run 7 of the cluster's 14 GPUs") == 1
    pool.pool.grant_deferred()
    assert pool.granted == [0, 1, 2]
    pool.pool.ended(WorkerId(Stage.DENOISE, 3, 0))  # the scheduler has withdrawn it
    pool.reservations[0].is_released = True
    pool.pool.grant_deferred()
    assert (pool.granted, pool.pool.deferred) == ([0, 1, 2, 4], 1)
    pool.nodes += nodes_of(8)
    pool.pool.grant_deferred()
    assert (pool.granted, pool.pool.deferred) == ([0, 1, 2, 4, 5], 0)


def test_without_a_share_every_group_asks_ray_at_once(monkeypatch):
    pool = Pool(monkeypatch, None, 2)
    for slot in range(6):
        pool.request(slot)
    assert (pool.granted, pool.pool.deferred) == ([0, 1, 2, 3, 4, 5], 0)
