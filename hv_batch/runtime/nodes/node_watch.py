"""Watches the nodes of the cluster: logs which ones join, drain and leave, and reports workers on draining nodes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from hv_batch.job.scheduling.messages import Event, WorkerId, WorkerLeaving
from hv_batch.job.stages import Stage
from hv_batch.runtime.nodes.cluster_view import ClusterView
from hv_batch.runtime.nodes.resources import show
from hv_batch.runtime.worker import Worker

logger = logging.getLogger(__name__)

# A preemption notice comes 30 s (Kubernetes) to 120 s (AWS) in advance.
CHECK_EVERY_S = 5.0


class NodeWatch:
    """Compares the cluster's nodes with those of the last check, at most every `CHECK_EVERY_S`."""

    def __init__(self, max_groups: int, cluster: ClusterView) -> None:
        self._cluster = cluster
        self._max_groups = max_groups
        self._looked = -math.inf
        self._names: dict[str, str] | None = None  # of the nodes that were alive at the last check
        self._draining: set[str] = set()

    def look(self, workers: Mapping[WorkerId, Worker], now: float) -> list[Event]:
        """Returns a `WorkerLeaving` for each worker on a draining node. `now` is a monotonic time."""
        if now - self._looked < CHECK_EVERY_S:
            return []
        self._looked = now
        draining = {node: until - now for node, until in self._cluster.draining().items()}
        self._log_changes(workers, draining)
        leaving: list[Event] = []
        for worker_id, worker in workers.items():
            remaining = [draining[node] for node in worker.nodes if node in draining]
            if remaining:
                leaving.append(WorkerLeaving(worker_id, now + min(remaining)))
        return leaving

    def _log_changes(self, workers: Mapping[WorkerId, Worker], draining: Mapping[str, float]) -> None:
        nodes = self._cluster.nodes()
        names = {node: f"{facts['NodeManagerAddress']} ({node[:8]})" for node, facts in nodes.items()}
        before = names if self._names is None else self._names
        for node in names.keys() - before.keys():
            hardware = show({name: nodes[node]["Resources"].get(name, 0.0) for name in ("CPU", "GPU")})
            logger.info(f"node {names[node]} has joined with {hardware}: {self._groups(workers)}")
        for node in before.keys() - names.keys():
            logger.warning(f"node {before[node]} has left: {self._groups(workers)}")
        for node in draining.keys() - self._draining:
            affected = ", ".join(str(worker_id) for worker_id, worker in workers.items() if node in worker.nodes)
            when = "" if draining[node] == math.inf else f" ({max(0.0, draining[node]):.0f} s left)"
            what = f"; no new samples for {affected}, unfinished samples are rescheduled" if affected else ""
            logger.warning(f"node {names.get(node, node[:8])} is draining{when}{what}")
        self._names, self._draining = names, set(draining)

    def _groups(self, workers: Mapping[WorkerId, Worker]) -> str:
        groups = [worker for worker_id, worker in workers.items() if worker_id.stage is Stage.DENOISE]
        placed = sum(bool(group.nodes) for group in groups)
        waiting = len(groups) - placed
        return f"{placed} of at most {self._max_groups} group(s) are placed, {waiting} wait for resources"
