"""The nodes that the actors of each stage avoid, and the warnings about them (P5). The cluster is simulated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.stages import Stage
from hv_batch.runtime.nodes.exclusion import NodeExclusion
from hv_batch.runtime.nodes.node_health import EXCLUDE_AFTER
from hv_batch.runtime.nodes.resources import NODE_LABEL, avoid_nodes


@pytest.fixture
def nodes():
    """The resources of each node of the cluster; tests change them."""
    return {"a": {"CPU": 8.0, "GPU": 3.0}, "b": {"CPU": 8.0, "GPU": 3.0}}


@pytest.fixture
def cluster(nodes):
    addresses = {node: {"NodeManagerAddress": f"host-{node}"} for node in nodes}
    return SimpleNamespace(alive=lambda: nodes, nodes=lambda: addresses)


def run_of(gpus):
    """Groups of two GPUs, pools of `gpus` each."""
    return resolve_run(
        RunConfig.model_validate(
            {"parallel": {"device": "cpu", "ulysses_degree": 2}, "encoders": {"gpus": gpus}, "decoders": {"gpus": gpus}}
        )
    )


def break_down(sick, stage, node):
    for _ in range(EXCLUDE_AFTER):
        sick.device_faulted(stage, [node], "CUDA error: ECC\nand more")


@pytest.mark.parametrize("stage", list(Stage))
def test_a_node_whose_device_fails_gets_no_actor_with_a_gpu(cluster, stage, logged):
    """P5: groups, encoders and decoders avoid an excluded node, whichever stage failed there; one warning is logged."""
    sick = NodeExclusion(run_of(gpus=0.5), cluster)
    break_down(sick, stage, "a")
    assert all(sick.avoided(other) == {"a"} for other in Stage)
    assert logged == ["node host-a (a) is excluded for the rest of this run: its device fails: CUDA error: ECC"]
    assert sick.reasons() == {"node host-a (a)": "its device fails: CUDA error: ECC"}
    assert avoid_nodes(sick.excluded) == {NODE_LABEL: "!in(a)"}


def test_the_worker_that_excluded_a_node_is_reported(cluster):
    """P5: the failure that excludes a node does not count against the slot; the first one does."""
    sick = NodeExclusion(run_of(gpus=0.5), cluster)
    assert [sick.start_failed(Stage.DENOISE, ["a"], "no device") for _ in range(3)] == [False, True, False]
    assert [sick.device_faulted(Stage.DENOISE, ["b"], "ECC") for _ in range(3)] == [False] * 3, "it cannot be spared"


def test_a_pool_without_gpus_avoids_the_nodes_that_failed_for_it(cluster, logged):
    """P5: a node with a broken ffmpeg gets no decoder, and keeps its groups and encoders."""
    sick = NodeExclusion(run_of(gpus=0.0), cluster)
    assert [sick.start_failed(Stage.DECODE, ["a"], "no ffmpeg") for _ in range(2)] == [False, True]
    assert sick.avoided(Stage.DECODE) == {"a"}
    assert sick.avoided(Stage.ENCODE) == sick.avoided(Stage.DENOISE) == frozenset()
    assert logged == [
        "node host-a (a) is excluded for the decoders of this run: decoders do not start there: no ffmpeg"
    ]
    assert sick.reasons() == {"node host-a (a)": "decoders do not start there: no ffmpeg"}


def test_a_tool_that_fails_in_tasks_excludes_its_node(cluster):
    """P5: two encodes in a row must fail; a success between them resets the count."""
    sick = NodeExclusion(run_of(gpus=0.0), cluster)
    assert not sick.tool_failed(Stage.DECODE, ["a"], "ffmpeg failed")
    sick.worked(Stage.DECODE, ["a"])
    assert [sick.tool_failed(Stage.DECODE, ["a"], "ffmpeg failed") for _ in range(2)] == [False, True]
    assert sick.avoided(Stage.DECODE) == {"a"}


def test_decoders_without_gpus_do_not_avoid_a_faulty_gpu(cluster):
    """P5: a GPU that fails says nothing about the CPUs of its node."""
    sick = NodeExclusion(run_of(gpus=0.0), cluster)
    break_down(sick, Stage.DENOISE, "a")
    assert sick.avoided(Stage.DENOISE) == {"a"}
    assert sick.avoided(Stage.DECODE) == frozenset()


def test_a_decoder_without_gpus_stays_if_no_other_node_has_room(nodes, cluster, logged):
    """P5: a run on one node, or beside a group that fills the other node, goes on there, and says so."""
    nodes["b"] = {"CPU": 0.5, "GPU": 3.0}
    sick = NodeExclusion(run_of(gpus=0.0), cluster)
    for _ in range(2):
        sick.tool_failed(Stage.DECODE, ["a"], "ffmpeg failed")
    assert sick.avoided(Stage.DECODE) == frozenset()
    assert logged[-1].endswith("no other node can host a group and the decoders: it stays in use")


def test_single_actors_may_stand_where_nothing_else_is_left_for_them(nodes, cluster):
    """P5: groups leave a node that the decoders need; the decoders leave it once another node has room."""
    nodes["b"] = {"CPU": 8.0, "GPU": 2.0}
    sick = NodeExclusion(run_of(gpus=0.5), cluster)
    break_down(sick, Stage.DENOISE, "a")
    assert sick.avoided(Stage.DENOISE) == {"a"}
    assert sick.avoided(Stage.DECODE) == frozenset()
    nodes["c"] = {"CPU": 8.0, "GPU": 1.0}
    assert sick.avoided(Stage.DECODE) == {"a"}


def test_a_decoder_without_another_node_excludes_none(nodes, cluster, logged):
    """P5: a node that the run cannot spare is named in a warning and stays in use."""
    nodes["b"] = {"CPU": 8.0, "GPU": 2.0}
    sick = NodeExclusion(run_of(gpus=0.5), cluster)
    break_down(sick, Stage.DECODE, "a")
    assert not sick.excluded
    (line,) = logged
    assert line.endswith("fails repeatedly, but no other node can host a group and the decoders: it stays in use")


def test_nodes_are_taken_back_when_no_group_could_stand_elsewhere(nodes, cluster, logged):
    """P5: if the last good node is lost, excluded nodes are readmitted."""
    sick = NodeExclusion(run_of(gpus=0.5), cluster)
    break_down(sick, Stage.DENOISE, "a")
    del nodes["b"]
    assert sick.avoided(Stage.DENOISE) == frozenset()
    assert "node host-a (a) may be used again" in logged[-1]
