"""Warns if Ray cannot place any encoder or decoder. Without the warning, groups that wait for them only look slow."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.runtime.nodes.cluster_view import ClusterView
from hv_batch.runtime.nodes.resources import SINGLES, can_place, show, show_cluster, single_actors
from hv_batch.runtime.worker import Worker

logger = logging.getLogger(__name__)

# Ray places an actor within a second if there are resources. An autoscaler needs some minutes to add a node.
WARN_AFTER_S = 60.0


class PendingActorWatch:
    """For the stages with pools of their own. `groups.reservation_pool` logs the groups that wait."""

    def __init__(self, run: ResolvedRun, cluster: ClusterView) -> None:
        self._cluster = cluster
        self._bundles = single_actors(run)
        self._since: dict[Stage, float] = {}  # since when the stage has workers, and none of them is placed
        self._warned: set[Stage] = set()

    def look(self, workers: Mapping[WorkerId, Worker], now: float) -> None:
        """May be called at any rate; logs one warning per stage and wait. `now` is a monotonic time."""
        for stage in self._bundles:
            own = [worker for worker_id, worker in workers.items() if worker_id.stage is stage]
            if not own or any(worker.nodes for worker in own):
                self._since.pop(stage, None)
                self._warned.discard(stage)
            elif now - self._since.setdefault(stage, now) >= WARN_AFTER_S and stage not in self._warned:
                self._warned.add(stage)
                logger.warning(self._why_waiting(stage))

    def _why_waiting(self, stage: Stage) -> str:
        nodes, bundle = list(self._cluster.alive().values()), self._bundles[stage]
        if can_place([[bundle]], nodes):
            remedy = "It starts when other actors release enough, or when nodes join."
        else:
            remedy = "No node of the cluster is large enough, even when idle: it starts only when nodes join."
        return (
            f"{SINGLES[stage]} waits for resources, and samples wait for it: it needs one node with {show(bundle)}; "
            f"{show_cluster(nodes, self._cluster.free())}. {remedy}"
        )
