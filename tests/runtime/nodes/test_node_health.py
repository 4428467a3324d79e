"""Node exclusion, over generated histories of a cluster (P5)."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.stages import Stage
from hv_batch.runtime.nodes.node_health import EXCLUDE_AFTER, NodeHealth

NODES = ("a", "b", "c", "d")


def leaves_one(nodes, stage=Stage.DENOISE):
    return len(nodes) < len(NODES)


def test_two_failed_starts_in_a_row_exclude_a_node():
    """P5: two failed starts in a row exclude a node, whichever groups failed; one does not."""
    health = NodeHealth(leaves_one)
    health.start_failed(Stage.DENOISE, ["a"], "no device")
    assert not health.excluded
    health.start_failed(Stage.DENOISE, ["b"], "elsewhere")
    health.start_failed(Stage.DENOISE, ["a"], "no device again")
    assert health.reasons == {"a": "no device again"}


def test_a_start_forgives_starts_and_a_sample_forgives_faults():
    """P5: with a faulty GPU groups start and then fail in every sample, so only a rendered sample resets the count."""
    health = NodeHealth(leaves_one)
    health.start_failed(Stage.DENOISE, ["a"], "bad luck")
    health.started(Stage.DENOISE, ["a"])
    health.start_failed(Stage.DENOISE, ["a"], "bad luck")
    assert not health.excluded
    health.device_faulted(Stage.DENOISE, ["b"], "ECC")
    health.worked(Stage.DENOISE, ["b"])
    health.device_faulted(Stage.DENOISE, ["b"], "ECC")
    health.started(Stage.DENOISE, ["b"])
    assert not health.excluded
    health.device_faulted(Stage.DENOISE, ["b"], "ECC once more")
    assert health.reasons == {"b": "ECC once more"}


def test_the_last_node_that_could_host_a_group_stays():
    """P5: a node that cannot be spared is returned by name and stays, until another node has joined."""
    spare = False
    health = NodeHealth(lambda nodes, stage: spare)
    health.start_failed(Stage.DENOISE, ["a"], "1")
    assert health.start_failed(Stage.DENOISE, ["a"], "2") == ["a"]
    assert not health.excluded
    spare = True
    assert health.start_failed(Stage.DENOISE, ["a"], "3") == []
    assert health.excluded == {"a"}


EVENTS = st.tuples(
    st.sampled_from(["start_failed", "device_faulted", "started", "worked"]),
    st.sampled_from([Stage.DENOISE, Stage.DECODE]),
    st.lists(st.sampled_from(NODES), min_size=1, max_size=2, unique=True),
)


def leaves_enough(nodes, stage):
    """A group needs one node, and a decoder another one."""
    return len(nodes) < len(NODES) - (stage is Stage.DECODE)


@given(st.lists(EVENTS, max_size=60))
def test_only_nodes_that_failed_in_a_row_are_excluded_and_never_all(history):
    """P5: whatever happens, a node is out exactly when one stage failed often enough in a row while others were
    left.
    """
    health = NodeHealth(leaves_enough)
    streak = Counter()
    for what, stage, nodes in history:
        before = health.excluded
        if what in ("started", "worked"):
            getattr(health, what)(stage, nodes)
            for node in nodes:
                streak["start_failed" if what == "started" else "device_faulted", stage, node] = 0
            assert health.excluded == before
            continue
        needed = getattr(health, what)(stage, nodes, "reason")
        for node in nodes:
            streak[what, stage, node] += 1
        due = {node for node in nodes if streak[what, stage, node] >= EXCLUDE_AFTER} - before
        assert health.excluded - before == due - set(needed)
        assert before <= health.excluded
        assert leaves_enough(health.excluded, Stage.DENOISE)
        assert all(not leaves_enough(health.excluded | {node}, stage) for node in needed)


def test_a_group_that_renders_says_nothing_of_a_decoders_gpu():
    """P5: each stage has its own counts, because its workers use other GPUs of the node."""
    health = NodeHealth(leaves_one)
    for _ in range(EXCLUDE_AFTER):
        health.device_faulted(Stage.DECODE, ["a"], "ECC")
        health.worked(Stage.DENOISE, ["a"])
    assert health.reasons == {"a": "ECC"}


def test_a_pardon_starts_afresh():
    """P5: readmitted nodes start with counts of zero."""
    health = NodeHealth(leaves_one)
    for _ in range(EXCLUDE_AFTER):
        health.start_failed(Stage.DENOISE, ["a"], "no device")
    assert health.readmit() == {"a"}
    health.start_failed(Stage.DENOISE, ["a"], "no device")
    assert not health.excluded
