"""Nodes that join, are to be taken away, and go: told to people, and to the scheduler where workers stand on them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

import ray

from hv_batch.job.scheduling.messages import Event, WorkerId, WorkerLeaving
from hv_batch.job.stages import Stage
from hv_batch.runtime.nodes.resources import show
from hv_batch.runtime.worker import Worker

logger = logging.getLogger(__name__)

# A spot notice comes 30 s (Kubernetes) to 120 s (AWS) ahead; asking costs the head node a few milliseconds.
LOOK_EVERY_S = 5.0


def draining_nodes() -> dict[str, float]:
    """Ids of the nodes that are to be taken away, and in how many seconds; inf where Ray was not told when.

    Ray has no public call for this; tests/cluster/test_nodes.py holds this one against a real drain.
    """
    deadlines_ms = ray._private.state.state.get_draining_nodes()  # Unix time, 0: none
    return {node: at / 1000 - time.time() if at else math.inf for node, at in deadlines_ms.items()}


class NodeWatch:
    """Looks every few seconds what has become of the cluster's nodes."""

    def __init__(self, most_groups: int) -> None:
        self._most_groups = most_groups
        self._looked = -math.inf
        self._names: dict[str, str] | None = None  # of the nodes that were alive at the last look
        self._draining: set[str] = set()

    def look(self, workers: Mapping[WorkerId, Worker], now: float) -> list[Event]:
        if now - self._looked < LOOK_EVERY_S:
            return []
        self._looked = now
        draining = draining_nodes()
        self._tell_changes(workers, draining)
        leaving: list[Event] = []
        for worker, life in workers.items():
            remaining = [draining[node] for node in life.nodes if node in draining]
            if remaining:
                leaving.append(WorkerLeaving(worker, now + min(remaining)))
        return leaving

    def _tell_changes(self, workers: Mapping[WorkerId, Worker], draining: Mapping[str, float]) -> None:
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        names = {node: f"{facts['NodeManagerAddress']} ({node[:8]})" for node, facts in nodes.items()}
        before = names if self._names is None else self._names
        for node in names.keys() - before.keys():
            hardware = show({name: nodes[node]["Resources"].get(name, 0.0) for name in ("CPU", "GPU")})
            logger.info(f"node {names[node]} has joined with {hardware}: {self._groups(workers)}")
        for node in before.keys() - names.keys():
            logger.warning(f"node {before[node]} is gone: {self._groups(workers)}")
        for node in draining.keys() - self._draining:
            standing = ", ".join(str(worker) for worker, life in workers.items() if node in life.nodes)
            when = "" if draining[node] == math.inf else f" in {max(0.0, draining[node]):.0f} s"
            what = f"; no new sample for {standing}, unfinished work goes on elsewhere" if standing else ""
            logger.warning(f"node {names.get(node, node[:8])} is to be taken away{when}{what}")
        self._names, self._draining = names, set(draining)

    def _groups(self, workers: Mapping[WorkerId, Worker]) -> str:
        groups = [life for worker, life in workers.items() if worker.stage is Stage.DENOISE]
        placed = sum(bool(group.nodes) for group in groups)
        return f"{placed} of at most {self._most_groups} group(s) are placed, {len(groups) - placed} wait for room"
