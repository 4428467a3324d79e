"""A run under Ray's autoscaler. The cloud is this machine: each requested node is a raylet."""

from __future__ import annotations

import json

import pytest
import ray

from tests.support.ray_head import free_port, started_head
from tests.support.runs import (
    PROMPTS,
    command,
    count,
    finish,
    records,
    start,
    videos,
    wait_for,
    write_config,
    write_manifest,
)

NODE = "a node of two GPUs"
MOST_NODES = 4
EMPTY = ("auth", "file_mounts")
NONE = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
NONE += ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def cloud(address):
    """The autoscaling config: the node types that Ray may request."""
    return {
        "cluster_name": "cloud",
        "max_workers": MOST_NODES,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,  # all nodes share the address of this machine
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
            NODE: {
                "resources": {"CPU": 2, "GPU": 2, "object_store_memory": 100 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MOST_NODES,
            },
        },
        "file_mounts_sync_continuously": False,
        **{key: {} for key in EMPTY},
        **{key: [] for key in NONE},
    }


@pytest.fixture
def autoscaled(ray_environment, tmp_path):
    """The address of a head without GPUs; the autoscaler adds nodes of two GPUs."""
    config, port = tmp_path / "cloud.json", free_port()
    config.write_text(json.dumps(cloud(f"127.0.0.1:{port}")))
    arguments = ["--num-cpus=4", "--num-gpus=0", f"--autoscaling-config={config}"]
    quick = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with started_head(tmp_path / "head.txt", port, *arguments, **quick) as (address, _):
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        yield address
        ray.shutdown()


def gpu_nodes():
    return sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_autoscaler_brings_nodes_for_the_groups_and_takes_them_away(autoscaled, tmp_path, marks, expected):
    """Elastic, P3: a cluster without a GPU gets a node for the first group, then one for each further group.

    It gets at most `groups.count` of them; surplus nodes are removed. When one sample is left, the nodes of the other
    groups are removed while that sample is rendered. No failure is reported, and the bytes do not change.
    """
    prompts = [f"{PROMPTS[0]} !hold-denoise", *PROMPTS[1:4]]
    config, output = write_config(tmp_path, marks, {"hold_after": [2]}, groups={"count": 3}), tmp_path / "out"
    driver = start(command(config, write_manifest(tmp_path, prompts), output, autoscaled))
    wait_for(lambda: count(marks, "steps").total() == 6, "two steps of three samples at once")
    wait_for(lambda: gpu_nodes() == 3, "a node for each group")
    (marks / "go-2").touch()
    wait_for(lambda: len(records(output)) == 3, "all but the sample that is held")
    wait_for(lambda: gpu_nodes() == 1, "that idle nodes are taken away")
    (marks / "go").touch()
    code, text = finish(driver)
    assert code == 0, text
    assert "waiting for nodes: Minimum: a group of 2 rank(s)" in text
    assert "the autoscaler of this cluster is version 1, which ignores label selectors" in text
    assert "INFRA" not in text
    assert len(count(marks, "ranks")) == 6, "three groups of two"
    assert len(records(output)) == 4
    assert not any(record["history"] for record in records(output).values())
    assert videos(output).items() <= expected
    wait_for(lambda: gpu_nodes() == 0, "that the last node is taken away")
