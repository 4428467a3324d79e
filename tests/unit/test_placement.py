"""The bill of materials, and whether nodes can pay it (P6)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.config import RunConfig
from hv_batch.runtime.placement import fits, group_bundles, least_bill, total


def test_a_group_of_eight_wants_one_node():
    """Design section 5: a group's bundles are packed strictly, so eight GPUs over two nodes are not enough."""
    bill = least_bill(RunConfig())
    assert total(group_bundles(RunConfig())) == {"CPU": 8.0, "GPU": 8.0}
    assert fits(bill, [{"CPU": 64, "GPU": 10}])
    assert fits(bill, [{"CPU": 64, "GPU": 8}, {"CPU": 8, "GPU": 2}])
    assert not fits(bill, [{"CPU": 64, "GPU": 5}, {"CPU": 64, "GPU": 5}])
    assert not fits(bill, [{"CPU": 64, "GPU": 8}])


def test_a_group_over_two_nodes_wants_two():
    """groups.nodes_per_group: the halves of a spanning group stand on different nodes, however large one of them is."""
    config = RunConfig.model_validate(
        {"parallel": {"ulysses_degree": 4, "ring_degree": 2}, "groups": {"nodes_per_group": 2}}
    )
    assert group_bundles(config) == [{"CPU": 4.0, "GPU": 4.0}] * 2
    assert fits(least_bill(config), [{"CPU": 8, "GPU": 5}] * 2)
    assert not fits(least_bill(config), [{"CPU": 64, "GPU": 16}])
    assert not fits(least_bill(config), [{"CPU": 64, "GPU": 16}, {"CPU": 64, "GPU": 3}])


def test_shares_of_a_gpu_add_up():
    """An encoder and a decoder with half a GPU each stand on one."""
    config = RunConfig.model_validate(
        {"parallel": {"ulysses_degree": 1}, "encoders": {"gpus": 0.5}, "decoders": {"gpus": 0.5}}
    )
    assert fits(least_bill(config), [{"CPU": 4, "GPU": 2}])
    assert not fits(least_bill(config), [{"CPU": 4, "GPU": 1}])


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.lists(st.integers(0, 8), max_size=4))
def test_nothing_fits_into_less_than_it_is(needs, nodes):
    """What fits never exceeds the sum, and always fits where every need has a node of its own."""
    bill = [[{"GPU": float(need)}] for need in needs]
    there = [{"GPU": float(size)} for size in nodes]
    if sum(needs) > sum(nodes):
        assert not fits(bill, there)
    assert fits(bill, [{"GPU": float(need)} for need in needs])
