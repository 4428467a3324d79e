"""Denoise groups on clusters of several nodes: placement, the cost of failures, and nodes that are avoided."""

from __future__ import annotations

import json
import os
import signal
from typing import NamedTuple

import pytest
import ray
from ray.util.placement_group import placement_group

from hv_batch.toy.checkpoint import write_toy_checkpoint
from tests.support.repository import ROOT
from tests.support.runs import (
    PROMPTS,
    command,
    count,
    finish,
    records,
    render,
    start,
    videos,
    wait_for,
    write_config,
    write_manifest,
)


class Rank(NamedTuple):
    host: str
    rank: int
    local_rank: int
    pid: int


def ranks(marks):
    """Every rank that has joined, in order."""
    path = marks / "ranks"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [Rank(host, *map(int, numbers)) for host, *numbers in lines]


@pytest.fixture(scope="module")
def spanning(fleet_head, tmp_path_factory):
    """A run of groups of eight over nodes of four and five GPUs; its folder, and its output."""
    folder = tmp_path_factory.mktemp("spanning")
    marks = folder / "marks"
    marks.mkdir()
    config = write_config(
        folder,
        marks,
        {"step_seconds": 0.6},  # long enough for the second group to be reported as waiting
        parallel={"ulysses_degree": 4, "ring_degree": 2},
        groups={"count": 2, "nodes_per_group": 2},
    )
    for gpus in (4, 5):
        fleet_head.add_node(gpus=gpus)
    code, text = render(config, write_manifest(folder, PROMPTS[:5]), folder / "out", fleet_head.address)
    fleet_head.clear()
    assert code == 0, text
    return folder, text


@pytest.mark.slow
def test_a_group_of_eight_spans_two_nodes(spanning, expected):
    """Placement, P3: four ranks on each node, the Ulysses neighbours of a plan 4 x 2 on the same one; the bytes are
    those of a group of two on one node.
    """
    joined = ranks(spanning[0] / "marks")
    assert [rank.rank for rank in sorted(joined, key=lambda rank: rank.rank)] == list(range(8))
    assert {rank.local_rank for rank in joined} == set(range(4))
    assert len({rank.host for rank in joined}) == 2
    assert len({(rank.host, rank.rank // 4) for rank in joined}) == 2
    assert all(rank.local_rank == rank.rank % 4 for rank in joined)
    assert len(records(spanning[0] / "out")) == 5
    assert videos(spanning[0] / "out").items() <= expected


@pytest.mark.slow
def test_groups_that_cannot_be_placed_are_reported_together(spanning):
    """Start-up, P6: one line while nothing changes: what a group needs, what there is, and whether it fits."""
    said = [line for line in spanning[1].splitlines() if "wait for nodes" in line]
    assert len(said) == 1
    assert "1 denoise group(s) are placed, 1 wait" in said[0]
    assert "2 nodes with 4 GPU each; the cluster has 12 CPU + 9 GPU on 3 node(s)" in said[0]
    assert "when other jobs release enough" in said[0]


@pytest.fixture
def rival(fleet):
    """Creates a placement group of another job, which waits for two GPUs of one node."""
    ray.init(address=fleet.address, log_to_driver=False, logging_level="ERROR")
    yield lambda: placement_group([{"GPU": 1}] * 2, strategy="STRICT_PACK")
    ray.shutdown()


@pytest.mark.slow
def test_a_disturbed_group_keeps_its_reservation(fleet, rival, tmp_path, marks, expected):
    """P3, P4: a group whose self-check fails renders nothing; a rank that dies or hangs costs one rebuild.

    A second group of the run and another job wait for the same two GPUs all the time. The second group may get them,
    and the other job must not. The bytes are those of an undisturbed run.
    """
    fleet.add_node(gpus=2)
    (marks / "disagree").touch()
    config = write_config(tmp_path, marks, {"step_seconds": 0.1}, groups={"count": 2}, timeouts={"stall_s": 3})
    output = tmp_path / "out"
    driver = start(command(config, write_manifest(tmp_path, PROMPTS[:5]), output, fleet.address))
    wait_for(lambda: ranks(marks), "the first incarnation")
    stranger = rival()
    for lives, sent in ((2, signal.SIGKILL), (3, signal.SIGSTOP)):
        # First the new ranks: rank 0 of the old ones may end its denoise after the kill of its peer.
        wait_for(lambda lives=lives: len(ranks(marks)) >= 2 * lives, "the next incarnation")
        done = len(count(marks, "denoised"))
        wait_for(lambda done=done: len(count(marks, "denoised")) > done, "another denoise")
        assert not stranger.wait(0)
        joined = ranks(marks)
        assert len(joined) == 2 * lives
        os.kill(next(rank.pid for rank in joined[-2:] if rank.rank == 1), sent)
    code, text = finish(driver)
    assert code == 0, text
    assert "this rank computes something else" in text
    found = records(output)
    assert [failure["kind"] for record in found.values() for failure in record["history"]] == ["INFRA"] * 2
    assert len(ranks(marks)) == 8, "four incarnations of two ranks"
    assert len(found) == 5
    assert videos(output).items() <= expected


@pytest.mark.slow
def test_the_reservation_of_a_group_that_is_not_rebuilt_is_released(fleet, rival, tmp_path, marks, expected):
    """P5: a group dies with its last sample, and no sample is left for another: another job gets its GPUs while the
    other group still renders.
    """
    fleet.add_node(gpus=4)
    config = write_config(tmp_path, marks, groups={"count": 2}, retries={"infra": 1})
    prompts = [f"{prompt} !hold-denoise" for prompt in PROMPTS[:2]]
    driver = start(command(config, write_manifest(tmp_path, prompts), tmp_path / "out", fleet.address))
    wait_for(lambda: sum(count(marks, "held").values()) == 2, "both denoises")
    stranger = rival()
    assert not stranger.wait(0)
    os.kill(ranks(marks)[-1].pid, signal.SIGKILL)
    assert stranger.wait(60)
    (marks / "go").touch()
    code, text = finish(driver)
    assert code == 3, text
    assert len(records(tmp_path / "out")) == len(records(tmp_path / "out", "quarantine")) == 1
    assert len(ranks(marks)) == 4, "two groups of two ranks, and none was built again"
    assert videos(tmp_path / "out").items() <= expected


@pytest.mark.slow
def test_an_idle_group_is_released_at_the_tail(fleet, rival, tmp_path, marks, expected):
    """Elastic, P3: of two groups, the one for which no sample is left is released: another job gets its GPUs while the
    other group still renders. No failure is reported.
    """
    fleet.add_node(gpus=4)
    prompts, output = [f"{PROMPTS[0]} !hold-denoise", PROMPTS[1]], tmp_path / "out"
    config = write_config(tmp_path, marks, {"hold_after": [2]}, groups={"count": 2})
    driver = start(command(config, write_manifest(tmp_path, prompts), output, fleet.address))
    wait_for(lambda: count(marks, "steps").total() == 4, "two steps of each")
    stranger = rival()
    assert not stranger.wait(0)
    (marks / "go-2").touch()
    assert stranger.wait(60)
    assert not records(output).keys() - {"s01"}, "the other one still renders"
    (marks / "go").touch()
    code, text = finish(driver)
    assert code == 0, text
    assert "is released: the rest of the run cannot keep it busy" in text
    assert "INFRA" not in text
    assert len(records(output)) == 2
    assert len(ranks(marks)) == 4, "no group was started again"
    assert videos(output).items() <= expected


@pytest.mark.slow
def test_a_node_that_is_lost_costs_one_rebuild_elsewhere(fleet, tmp_path, marks, expected):
    """P3, P4, P5: the node of the group is killed as by a power cut; its sample is rendered on the other node."""
    nodes = {node.node_ip_address: node for node in (fleet.add_node(gpus=2), fleet.add_node(gpus=2))}
    config, output = write_config(tmp_path, marks, {"step_seconds": 0.3}), tmp_path / "out"
    driver = start(command(config, write_manifest(tmp_path, PROMPTS[:3]), output, fleet.address))
    wait_for(lambda: count(marks, "denoised"), "a denoise")
    fleet.kill_node(nodes[ranks(marks)[0].host])
    code, text = finish(driver)
    assert code == 0, text
    assert len(records(output)) == 3
    assert {rank.host for rank in ranks(marks)} == set(nodes), "it was rendered on the other node"
    assert videos(output).items() <= expected


@pytest.mark.slow
def test_a_run_whose_nodes_are_gone_ends_in_time_and_is_resumed(fleet, tmp_path, marks, expected):
    """P2, P3, P5: the only node that could host a group is killed. The run reports what it needs and that the cluster
    is too small, waits for timeouts.start_s and ends. With a node again, the same command finishes it.
    """
    dying = fleet.add_node(gpus=2)
    config = write_config(tmp_path, marks, {"step_seconds": 0.3}, timeouts={"start_s": 40})
    manifest, output = write_manifest(tmp_path, PROMPTS[:3]), tmp_path / "out"
    driver = start(command(config, manifest, output, fleet.address))
    wait_for(lambda: count(marks, "denoised"), "a denoise")
    fleet.kill_node(dying)
    code, text = finish(driver)
    assert code == 1, text
    assert "The cluster is too small for this run, even when idle. Minimum: a group of 2 rank(s)" in text
    assert "one node with 2 GPU" in text
    assert "Add nodes, or request less in the config" in text
    assert "Traceback" not in text
    fleet.add_node(gpus=2)
    code, text = render(config, manifest, output, fleet.address)
    assert code == 0, text
    assert len(records(output)) == 3
    assert videos(output).items() <= expected


@pytest.mark.slow
def test_sick_nodes_are_excluded_as_soon_as_they_can_be_spared(fleet, tmp_path, marks, expected):
    """P5: a node where no group starts is used as long as it is the only one, and avoided once there are others.

    One of those has a GPU that fails with every sample: after two tries the sample is rendered on the third node.
    """
    sick = fleet.add_node(gpus=2)
    (marks / f"sick-{sick.node_ip_address}").touch()
    config, output = write_config(tmp_path, marks, {"step_seconds": 0.3}, retries={"worker": 9}), tmp_path / "out"
    driver = start(command(config, write_manifest(tmp_path, PROMPTS[:1]), output, fleet.address))
    wait_for(lambda: "no other node can host a group: it stays" in driver.stdout.readline(), "that it cannot be spared")
    well = {node.node_ip_address for node in (fleet.add_node(gpus=2), fleet.add_node(gpus=2))}
    wait_for(lambda: ranks(marks)[-1].host in well, "a start elsewhere")
    faulty = ranks(marks)[-1].host
    (marks / f"faulty-{faulty}").touch()
    code, text = finish(driver)
    assert code == 0, text
    assert records(output)["s00"]["attempts"] == 3
    assert {ranks(marks)[-1].host} == well - {faulty}
    excluded = json.loads((output / "summary.json").read_text())["excluded_nodes"]
    assert len(excluded) == 2
    for host, why in ((sick.node_ip_address, "groups do not start there"), (faulty, "its device fails")):
        ((node, reason),) = ((node, reason) for node, reason in excluded.items() if host in node)
        assert why in reason
        assert f"{node} is excluded for the rest of this run: {why}" in text
    assert videos(output).items() <= expected


@pytest.mark.slow
def test_an_excluded_node_is_left_by_the_pools_too(fleet, tmp_path, marks, expected):
    """P5: encoder and decoder run on a node where no group starts; when the decoder's GPU fails there, the next decoder
    is placed on another node, although the first has more free resources.
    """
    sick = fleet.add_node(gpus=3)
    (marks / f"sick-{sick.node_ip_address}").touch()
    pools = {"encoders": {"gpus": 0.5}, "decoders": {"gpus": 0.5}}
    config, output = write_config(tmp_path, marks, retries={"worker": 9}, **pools), tmp_path / "out"
    driver = start(command(config, write_manifest(tmp_path, PROMPTS[:1]), output, fleet.address))
    wait_for(lambda: "no other node can host a group: it stays" in driver.stdout.readline(), "that it cannot be spared")
    wait_for(lambda: count(marks, "decoders"), "a decoder")
    (marks / f"faulty-decoder-{sick.node_ip_address}").touch()
    well = fleet.add_node(gpus=3)
    code, text = finish(driver)
    assert code == 0, text
    assert "is excluded for the rest of this run: groups do not start there" in text
    hosts = (marks / "decoders").read_text().split()
    assert hosts == [sick.node_ip_address, well.node_ip_address]
    (record,) = records(output).values()
    assert [failure["kind"] for failure in record["history"]] == ["INFRA"]
    assert videos(output).items() <= expected


@pytest.mark.slow
def test_a_group_that_does_not_meet_in_time_is_built_again(fleet, tmp_path, marks, expected):
    """Start-up, P3, P5: a rank that hangs while it joins is ended after timeouts.start_s. This is reported and
    charged to no sample.
    """
    fleet.add_node(gpus=2)
    (marks / "never-meets").touch()
    config = write_config(tmp_path, marks, timeouts={"start_s": 40})
    code, text = render(config, write_manifest(tmp_path, PROMPTS[:1]), tmp_path / "out", fleet.address)
    assert code == 0, text
    assert "denoise-0.0: INFRA: its ranks did not load and meet within timeouts.start_s" in text
    assert records(tmp_path / "out")["s00"]["attempts"] == 1
    assert videos(tmp_path / "out").items() <= expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_ring_across_two_nodes_gives_the_bytes_of_one(fleet, tmp_path):
    """P3: the real engine over gloo; eight ranks, the Ulysses four of each half on a node of their own and the ring
    across, render what the same plan renders inside one node.
    """
    base = write_toy_checkpoint(tmp_path / "toy")
    config, manifest = ROOT / "configs" / "fake_gpus_8rank.yaml", write_manifest(tmp_path, PROMPTS[:1])
    overrides = [f"model.options.model_base={base}", "defaults.height=64", "defaults.width=64"]
    overrides += ["defaults.num_frames=9", "defaults.num_inference_steps=2"]
    for folder, sizes, over in (("two", (4, 4), ["groups.nodes_per_group=2"]), ("one", (8,), [])):
        for gpus in sizes:
            fleet.add_node(gpus=gpus)
        driver = start(command(config, manifest, tmp_path / folder, fleet.address, *overrides, *over))
        code, text = finish(driver, timeout=400)  # eight processes that load torch, on a busy machine
        assert code == 0, text
    assert len(videos(tmp_path / "one")) == 1
    assert videos(tmp_path / "two") == videos(tmp_path / "one")
