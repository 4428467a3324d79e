"""Encoders and decoders that find no room: people are told, because groups that wait for them only look slow."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.runtime.nodes.resources import SINGLES, alive_nodes, can_place, show, show_cluster, single_actors
from hv_batch.runtime.worker import Worker

logger = logging.getLogger(__name__)

# Ray places a single actor within a second, and asks an autoscaler that brings a node for it within some minutes.
SAY_AFTER_S = 60.0


class PendingActorWatch:
    """Of the stages that stand by themselves. Groups tell of their own waiting; see `group_pool`."""

    def __init__(self, run: ResolvedRun) -> None:
        self._asked = single_actors(run)
        self._since: dict[Stage, float] = {}  # nobody of the stage has room, and somebody wants it
        self._said: set[Stage] = set()

    def look(self, workers: Mapping[WorkerId, Worker], now: float) -> None:
        """As often as you like; each waiting is told of once."""
        for stage in self._asked:
            lives = [life for worker, life in workers.items() if worker.stage is stage]
            if not lives or any(life.nodes for life in lives):
                self._since.pop(stage, None)
                self._said.discard(stage)
            elif now - self._since.setdefault(stage, now) >= SAY_AFTER_S and stage not in self._said:
                self._said.add(stage)
                logger.warning(self._why_waiting(stage))

    def _why_waiting(self, stage: Stage) -> str:
        nodes, bundle = list(alive_nodes().values()), self._asked[stage]
        hope = "It begins when others let go of enough, or when nodes join."
        if not can_place([[bundle]], nodes):
            hope = "No node here could ever hold it: it begins only when others join."
        return (
            f"{SINGLES[stage]} waits for room, and the samples for it: it asks for one node with {show(bundle)}; "
            f"{show_cluster(nodes)}. {hope}"
        )
