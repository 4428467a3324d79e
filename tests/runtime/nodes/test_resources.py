"""The minimum resources of a run, and whether nodes can provide them (P6)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.protocol import UserError
from hv_batch.runtime.nodes import resources
from hv_batch.runtime.nodes.resources import (
    SAY_EVERY_S,
    STORE_SHARE,
    ResourceShortage,
    can_place,
    group_bundles,
    minimum_resources,
    result_share,
    total,
)


def test_a_group_of_eight_wants_one_node():
    """P6: the bundle of a group must fit on one node, so eight GPUs on two nodes are not enough."""
    run = resolve_run(RunConfig())
    bill = minimum_resources(run)
    assert total(group_bundles(run, run.groups.largest)) == {"CPU": 8.0, "GPU": 8.0}
    assert can_place(bill, [{"CPU": 64, "GPU": 10}])
    assert can_place(bill, [{"CPU": 64, "GPU": 8}, {"CPU": 8, "GPU": 2}])
    assert not can_place(bill, [{"CPU": 64, "GPU": 5}, {"CPU": 64, "GPU": 5}])
    assert not can_place(bill, [{"CPU": 64, "GPU": 8}])


def test_a_group_over_two_nodes_wants_two():
    """groups.nodes_per_group: the halves of a group are on different nodes, however large one of them is."""
    config = RunConfig.model_validate(
        {"parallel": {"ulysses_degree": 4, "ring_degree": 2}, "groups": {"nodes_per_group": 2}}
    )
    run = resolve_run(config)
    assert group_bundles(run, run.groups.largest) == [{"CPU": 4.0, "GPU": 4.0}] * 2
    assert can_place(minimum_resources(run), [{"CPU": 8, "GPU": 5}] * 2)
    assert not can_place(minimum_resources(run), [{"CPU": 64, "GPU": 16}])
    assert not can_place(minimum_resources(run), [{"CPU": 64, "GPU": 16}, {"CPU": 64, "GPU": 3}])


def test_shares_of_a_gpu_add_up():
    """An encoder and a decoder with half a GPU each share one."""
    config = RunConfig.model_validate(
        {"parallel": {"ulysses_degree": 1}, "encoders": {"gpus": 0.5}, "decoders": {"gpus": 0.5}}
    )
    assert can_place(minimum_resources(resolve_run(config)), [{"CPU": 4, "GPU": 2}])
    assert not can_place(minimum_resources(resolve_run(config)), [{"CPU": 4, "GPU": 1}])


def test_who_may_meet_on_a_node_share_its_store():
    """P7: however Ray places a stage's workers, their shares add up to at most STORE_SHARE of the smallest store."""
    small = {"CPU": 64.0, "GPU": 8.0, "object_store_memory": 800.0}
    large = {"CPU": 64.0, "GPU": 16.0, "object_store_memory": 1e4}
    head = {"CPU": 8.0, "object_store_memory": 10.0}
    group = {"GPU": 8.0, "CPU": 8.0}
    assert result_share(group, 1, [head, small, large]) == STORE_SHARE * 800.0, "no group can stand on the head"
    assert result_share(group, 5, [head, small, large]) == STORE_SHARE * 800.0 / 2, "two may meet on the large one"
    assert result_share(group, 1, [head]) == math.inf
    assert result_share({"GPU": 0.1}, 30, [small]) == STORE_SHARE * 800.0 / 30
    assert result_share({}, 3, [head]) == STORE_SHARE * 10.0 / 3, "who asks for nothing may be anywhere"


def test_groups_that_decode_want_no_decoder():
    """decoders.placement: group: nine GPUs are enough, whatever decoders.gpus says, even nothing."""
    config = RunConfig.model_validate({"decoders": {"placement": "group", "gpus": 0.0}})
    assert len(minimum_resources(resolve_run(config))) == 2
    assert can_place(minimum_resources(resolve_run(config)), [{"CPU": 64, "GPU": 9}])


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.lists(st.integers(0, 8), max_size=4))
def test_nothing_fits_into_less_than_it_is(needs, nodes):
    """What can be placed never exceeds the sum of the nodes; everything fits if each bundle has an own node."""
    bill = [[{"GPU": float(need)}] for need in needs]
    there = [{"GPU": float(size)} for size in nodes]
    if sum(needs) > sum(nodes):
        assert not can_place(bill, there)
    assert can_place(bill, [{"GPU": float(need)} for need in needs])


@pytest.fixture
def nodes(monkeypatch):
    """The resources of the nodes of a simulated cluster without an autoscaler; tests change them."""
    there = {"node": {"CPU": 64.0, "GPU": 10.0}}
    monkeypatch.setattr(resources, "request_resources", lambda bundles: None)
    return there


def test_a_run_that_can_go_on_nowhere_ends_in_time(nodes, logged):
    """P5, P6: when its nodes are gone, and it has had nothing to do for as long as a start may take, a run says what it
    asks, what there is, and that this will never do.
    """
    shortage = ResourceShortage(resolve_run(RunConfig()), timeout_s=100.0)

    def lasts(now, **busy):
        return shortage.lasts(list(nodes.values()), now, **busy)

    assert not lasts(0.0)
    nodes["node"]["GPU"] = 7.0
    assert lasts(200.0, is_busy=True)
    assert lasts(200.0 + 2 * SAY_EVERY_S, is_busy=True)
    (line,) = logged
    assert line.startswith("waiting for nodes: Minimum: a group of 8 rank(s) on one node with 8 CPU + 8 GPU")
    assert line.endswith("Nodes of the cluster: 64 CPU + 7 GPU.")
    assert lasts(300.0, is_busy=True), "decodes that still run are worth waiting for"
    assert lasts(399.0)
    nodes["another"] = {"CPU": 64.0, "GPU": 10.0}
    assert not lasts(399.5), "one has come in time"
    del nodes["another"]
    assert lasts(450.0)
    with pytest.raises(UserError, match=r"(?s)8 GPU.* 7 GPU\. Add nodes, or request less"):
        lasts(550.0)
