"""A recent view of the cluster, so that the driver's loop does not wait for Ray's control store.

A request to the control store takes milliseconds, and longer on a large cluster. A thread makes the requests, and the
loop reads the last answers.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

from hv_batch.runtime.nodes.resources import Bundle

REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class _Reading:
    groups: Mapping[str, Mapping[str, Any]]  # Ray's placement groups by id
    nodes: Mapping[str, Mapping[str, Any]]  # Ray's description of each node that is alive, by id
    draining: Mapping[str, float]  # monotonic time of the end of each draining node; inf if Ray has no deadline for it
    free: Bundle

    @staticmethod
    def take() -> _Reading:
        groups = placement_group_table()  # first: a node on which a group is placed is then among the nodes below
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        return _Reading(groups, nodes, _draining_nodes(), ray.available_resources())


class ClusterView:
    """The state of the cluster at most about REFRESH_S ago.

    If a request fails, its error is raised by the next access.
    """

    def __init__(self) -> None:
        self._reading = _Reading.take()
        self._seen = set(self._reading.nodes)
        self._error: Exception | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, name="driver-cluster", daemon=True).start()

    def nodes(self) -> Mapping[str, Mapping[str, Any]]:
        """Ray's description of each node that is alive, by its Ray id."""
        return self._current().nodes

    def alive(self) -> dict[str, Bundle]:
        """The total resources of each node that is alive, by its Ray id."""
        return {node: facts["Resources"] for node, facts in self._current().nodes.items()}

    def free(self) -> Bundle:
        """The resources of all nodes together that no actor or task has reserved."""
        return self._current().free

    def draining(self) -> dict[str, float]:
        """The monotonic time at which each draining node ends; inf if Ray has no deadline for it."""
        return dict(self._current().draining)

    def has_lost(self, node: str) -> bool:
        """Whether the node has left. A node that has joined since the last request has not."""
        return node not in self._current().nodes and node in self._seen

    def group_state(self, group: PlacementGroup) -> Mapping[str, Any] | None:
        """Ray's description of a placement group; None if it was requested after the last request."""
        return self._current().groups.get(group.id.hex())

    def refresh(self) -> None:
        """Ask Ray now. Blocks."""
        reading = _Reading.take()
        self._seen.update(reading.nodes)
        self._reading = reading

    def close(self) -> None:
        self._closed.set()

    def _current(self) -> _Reading:
        if self._error is not None:
            raise self._error
        return self._reading

    def _refresh(self) -> None:
        while not self._closed.wait(REFRESH_S):
            try:
                self.refresh()
            except Exception as error:  # noqa: BLE001  (raised again, in the loop's thread)
                self._error = error
                return


def _draining_nodes() -> dict[str, float]:
    """Ray has no public API for this; tests/cluster/test_nodes.py checks this one with a real drain."""
    deadlines_ms = ray._private.state.state.get_draining_nodes()  # Unix time, 0: none
    from_unix = time.monotonic() - time.time()
    return {node: at / 1000 + from_unix if at else math.inf for node, at in deadlines_ms.items()}
