"""The warning about encoders and decoders that Ray cannot place. The cluster is simulated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.runtime.nodes.pending_actors import WARN_AFTER_S, PendingActorWatch

CONFIG = {"encoders": {"placement": "colocated", "gpus": 0.3}, "decoders": {"gpus": 1.0, "cpus": 2.0}}


@pytest.fixture
def nodes():
    """The resources of the nodes; one CPU is free."""
    return {"a": {"CPU": 16.0, "GPU": 8.0}, "b": {"CPU": 4.0}}


@pytest.fixture
def cluster(nodes):
    return SimpleNamespace(alive=lambda: nodes, free=lambda: {"CPU": 1.0})


def stage(stage, *placed):
    return {WorkerId(stage, slot, 0): SimpleNamespace(nodes=frozenset(nodes)) for slot, nodes in enumerate(placed)}


def test_a_worker_without_resources_is_reported_once(nodes, cluster, logged):
    """P5: groups that wait for a decoder render nothing, so the log names the resources that it requests, the free
    ones, and whether any node can ever provide them. It repeats this only after the decoder had resources in between.
    """
    watch = PendingActorWatch(resolve_run(RunConfig.model_validate(CONFIG)), cluster)
    alone, joined = stage(Stage.DECODE, ()), stage(Stage.DECODE, (), ("a",))
    for now in (0.0, WARN_AFTER_S - 1.0):
        watch.look(alone, now)
    assert not logged
    watch.look(joined, WARN_AFTER_S)
    watch.look(alone, WARN_AFTER_S + 1.0)
    assert not logged, "one of them had room meanwhile"
    for now in (2 * WARN_AFTER_S + 1.0, 9 * WARN_AFTER_S):
        watch.look(alone, now)
    assert logged == [
        "a decoder waits for resources, and samples wait for it: it needs one node with 2 CPU + 1 GPU; the cluster has "
        "20 CPU + 8 GPU on 2 node(s), of which 1 CPU + 0 GPU are free. It starts when other actors release enough, or "
        "when nodes join."
    ]
    watch.look(joined, 10 * WARN_AFTER_S)
    del nodes["a"]
    for now in (11 * WARN_AFTER_S, 12 * WARN_AFTER_S):
        watch.look(alone, now)
    assert logged[1].endswith("No node of the cluster is large enough, even when idle: it starts only when nodes join.")


def test_colocated_encoders_and_idle_workers_are_not_reported(cluster, logged):
    """Colocated encoders wait for a group, for which there is another warning; a stage without workers needs none."""
    watch = PendingActorWatch(resolve_run(RunConfig.model_validate(CONFIG)), cluster)
    for now in (0.0, 2 * WARN_AFTER_S):
        watch.look(stage(Stage.ENCODE, ()), now)
    assert not logged
