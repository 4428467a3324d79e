"""A real Ray cluster of several nodes on this machine; tests add, remove and kill nodes.

Each node is a raylet of its own with an address of its own (127.0.0.x) and GPUs that do not exist. Nothing is shared
with the head of conftest.py but the machine: ports are free ones, and Ray names a session's folder after its process.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

# By default Ray declares a silent node dead after 15 s, which is too long for tests of lost nodes.
QUICK_OBITUARY = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


class Fleet:
    """The head, which has only CPUs, and the nodes that a test has added."""

    def __init__(self):
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 8,
                "num_gpus": 0,
                "include_dashboard": False,
                "_system_config": QUICK_OBITUARY,
            },
        )
        self._hosts = count(2)

    @property
    def address(self) -> str:
        return self._cluster.address

    @property
    def nodes(self):
        """The nodes that a test has added and not removed."""
        return list(self._cluster.worker_nodes)

    def add_node(self, *, gpus, cpus=2, labels=None, store_bytes=150 * 2**20, environment=None):
        """A node, alive on return. Its Ray id is `node.node_id`. Its processes get the variables in `environment`."""
        return self._cluster.add_node(
            num_gpus=gpus,
            num_cpus=cpus,
            labels=labels or {},
            env_vars=environment or {},
            object_store_memory=store_bytes,
            node_ip_address=f"127.0.0.{next(self._hosts)}",
        )

    def object_store(self, node):
        """Ray's statistics of a node's object store: bytes used, bytes spilled to disk, ..."""
        (entry,) = [entry for entry in self._cluster.global_state.node_table() if entry["NodeID"] == node.node_id]
        return node_stats(entry["NodeManagerAddress"], entry["NodeManagerPort"]).store_stats

    def kill_node(self, node):
        """Like a power failure: raylet, actors and agents die by SIGKILL, and Ray detects it later."""
        raylets = [process.process.pid for process in node.all_processes["raylet"]]
        victims = [pid for raylet in raylets for pid in descendants(raylet)]
        self._cluster.remove_node(node, allow_graceful=False)
        for pid in victims:
            with suppress(ProcessLookupError):  # it had noticed the end of its raylet
                os.kill(pid, signal.SIGKILL)

    def remove_node(self, node):
        """Like `ray stop`: the node unregisters, and its actors end."""
        self._cluster.remove_node(node)

    def clear(self):
        """Remove every node except the head, and wait until Ray has registered that."""
        for node in self.nodes:
            self._cluster.remove_node(node)
        self._cluster.wait_for_nodes()

    def close(self):
        self._cluster.shutdown()


def descendants(parent: int) -> list[int]:
    """All descendant processes of `parent`, from one pass over /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, left = [], [parent]
    while left:
        own = children.get(left.pop(), [])
        found += own
        left += own
    return found


@pytest.fixture(scope="session")
def fleet_head(ray_environment):
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(fleet_head):
    """The cluster with only its head; nodes that a test adds are removed after it."""
    yield fleet_head
    fleet_head.clear()
