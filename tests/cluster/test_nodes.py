"""Nodes that join, are drained and die under a run, on a real cluster of several nodes with the fake engine.

Samples are held in the middle of their denoise until the test has seen what it waits for, so nothing here is timed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

from tests.support.runs import (
    command,
    count,
    dataset,
    finish,
    records,
    start,
    videos,
    wait_for,
    write_config,
    write_manifest,
)

PROMPTS = [f"prompt {i} !hold-denoise" for i in range(6)]


def drain(fleet, node, seconds=None):
    """Like a preemption notice of a cloud, or an operator's `ray drain-node`."""
    accepted, why_not = GcsClient(address=fleet.address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test takes it",
        0 if seconds is None else int((time.time() + seconds) * 1000),
    )
    assert accepted, why_not


class Run:
    """A run whose samples are held in their denoise until `go`."""

    def __init__(self, folder: Path, fleet, engine_options=None, prompts=PROMPTS, **sections):
        self.output, self.marks = folder / "out", folder / "marks"
        self.marks.mkdir(exist_ok=True)
        # Every actor wants GPUs, so that all stand on the nodes that come and go and none on the head.
        pools = {"encoders": {"gpus": 0.5}, "decoders": {"gpus": 0.5}}
        config = write_config(folder, self.marks, engine_options, **{**pools, **sections})
        self.driver = start(command(config, write_manifest(folder, prompts), self.output, fleet.address))
        self.text = ""

    def wait_until_held(self, samples):
        wait_for(lambda: sum(count(self.marks, "held").values()) >= samples, f"{samples} denoises")

    def wait_until_said(self, what):
        while what not in self.text:
            line = self.driver.stdout.readline()
            assert line, f"never said {what!r}:\n{self.text}"
            self.text += line

    def go(self):
        """Let all samples finish."""
        (self.marks / "go").touch()
        code, rest = finish(self.driver)
        self.text += rest
        assert code == 0, self.text

    def history(self):
        """The failure classes of each sample's failed tries."""
        return {key: [failure["kind"] for failure in record["history"]] for key, record in records(self.output).items()}

    def groups(self):
        return {record["places"]["denoise"]["worker"] for record in records(self.output).values()}

    def groups_lost(self):
        return json.loads((self.output / "summary.json").read_text())["groups_lost"]


@pytest.fixture(scope="module")
def grown(fleet_head, tmp_path_factory):
    """A run that starts on one node with one group; then a second node joins. Nothing fails."""
    fleet_head.add_node(gpus=3)
    run = Run(tmp_path_factory.mktemp("grown"), fleet_head, groups={"count": 3})
    run.wait_until_held(1)
    fleet_head.add_node(gpus=2)
    run.wait_until_held(2)
    run.wait_until_said("has joined with 2 CPU + 2 GPU")
    run.go()
    fleet_head.clear()
    return run


@pytest.mark.slow
def test_a_node_that_joins_speeds_up_the_run(grown, expected):
    """Elastic, P3, P5: the second group renders while the first still does, the third waits for resources and delays
    none; the bytes are those of one group.
    """
    assert len(grown.groups()) == 2
    assert "of at most 3 group(s) are placed" in grown.text
    assert not any(grown.history().values())
    assert grown.groups_lost() == {}
    assert len(records(grown.output)) == 6
    assert videos(grown.output).items() <= expected


@pytest.mark.slow
def test_a_group_that_is_not_needed_is_released(grown):
    """Elastic, P5: a group that was never placed is withdrawn once the others suffice, without a failure."""
    (withdrawn,) = {"denoise-1.0", "denoise-2.0"} - grown.groups()  # Ray chooses which of two that wait to place
    assert f"{withdrawn} is released" in grown.text
    assert "encode-0.0 is released" in grown.text
    assert "INFRA" not in grown.text


@pytest.mark.slow
def test_nodes_that_are_drained_or_die_cost_steps_only(fleet, grown, tmp_path):
    """P4, P5: encoder, decoder and group leave a drained node in time; the next node is lost as in a power cut. Each
    time a sample is interrupted. It resumes, and is charged with PREEMPTED only, or with one INFRA.
    """
    leaving = fleet.add_node(gpus=3)
    run = Run(tmp_path, fleet, groups={"checkpoint_every": 1})
    run.wait_until_held(1)
    dying = fleet.add_node(gpus=3)
    drain(fleet, leaving, seconds=8)
    run.wait_until_said("denoise-0.0 with s00: PREEMPTED")
    run.wait_until_held(2)
    fleet.add_node(gpus=3)
    fleet.kill_node(dying)
    run.wait_until_said("denoise-0.1 with s01: INFRA")  # the first one is encoded anew meanwhile
    run.go()
    assert "is draining (" in run.text
    assert not {"denoise-0.0", "denoise-0.1"} & run.groups()
    steps = count(run.marks, "steps")
    assert [steps[f"{prompt} 1"] for prompt in PROMPTS[:2]] == [1, 1], "they went on from their step checkpoints"
    assert run.history() == {"s00": ["PREEMPTED"], "s01": ["INFRA"], **{f"s{i:02d}": [] for i in range(2, 6)}}
    assert run.groups_lost() == {kind: {"groups": 1, "gpu_seconds": None} for kind in ("INFRA", "PREEMPTED")}
    assert dataset(run.output) == dataset(grown.output)


@pytest.mark.slow
def test_a_drain_without_a_deadline_costs_nothing(fleet, grown, tmp_path):
    """P4: a denoise that can finish before its node is removed does; then the group starts on another node."""
    leaving = fleet.add_node(gpus=3)
    run = Run(tmp_path, fleet)
    run.wait_until_held(1)
    fleet.add_node(gpus=3)
    drain(fleet, leaving)
    run.wait_until_said("no new samples for denoise-0.0")
    run.go()
    assert not any(run.history().values())
    assert records(run.output)["s00"]["places"]["denoise"]["worker"] == "denoise-0.0"
    assert run.groups() == {"denoise-0.0", "denoise-0.1"}
    assert dataset(run.output) == dataset(grown.output)


@pytest.mark.slow
def test_a_node_that_dies_takes_only_its_group(fleet, grown, tmp_path):
    """P4, P5: a run on two nodes survives the loss of one; samples in progress there are rendered again."""
    fleet.add_node(gpus=3)
    run = Run(tmp_path, fleet, groups={"count": 2})
    run.wait_until_held(1)
    dying = fleet.add_node(gpus=2)
    run.wait_until_held(2)
    run.wait_until_said(f"({dying.node_id[:8]}) has joined")  # a node that dies between two checks is not reported
    fleet.kill_node(dying)
    run.wait_until_said("denoise-1.0 with s01: INFRA")
    run.wait_until_said("has left")
    run.go()
    assert run.history() == {"s01": ["INFRA"], **{f"s{i:02d}": [] for i in (0, 2, 3, 4, 5)}}
    assert run.groups_lost() == {"INFRA": {"groups": 1, "gpu_seconds": None}}
    assert dataset(run.output) == dataset(grown.output)


@pytest.mark.slow
def test_a_drain_notice_requests_a_checkpoint(fleet, tmp_path, expected):
    """P3, P4: without periodic checkpoints, a denoise on a node that will be removed writes one after its current step.
    The denoise resumes from it on another node, and no step is computed twice.
    """
    leaving = fleet.add_node(gpus=3)
    slowly = {"hold_after": [1, 2], "step_seconds": 3.0}  # so that the second one ends after it was asked for
    run = Run(tmp_path, fleet, slowly, ["prompt 0"], groups={"checkpoint_every": 0})
    wait_for(lambda: count(run.marks, "steps").total() == 1, "the first step")
    fleet.add_node(gpus=3)
    drain(fleet, leaving, seconds=20)
    run.wait_until_said("is draining (")
    (run.marks / "go-1").touch()
    run.wait_until_said("denoise-0.0 with s00: PREEMPTED")
    (run.marks / "go-2").touch()
    run.go()
    (record,) = records(run.output).values()
    assert record["places"]["denoise"]["resumed_from_step"] == 2
    assert set(count(run.marks, "steps").values()) == {1}
    assert run.history() == {"s00": ["PREEMPTED"]}
    assert videos(run.output).items() <= expected
