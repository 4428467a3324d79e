"""The nodes that this run's GPU actors keep off: asked before an actor is placed, told when one fails, said to people.

What is decided (which node is excluded) is the pure layer's, `job.nodes`. Groups keep off whatever is excluded. Single
actors do too, as long as the other nodes could host one of each stage; else a run whose only spare GPU is on such a
node would wait for ever. Pools without GPUs neither blame nodes nor keep off any.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import ray

from hv_batch.job.config.sections import DecodersConfig, EncodersConfig
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.stages import Stage
from hv_batch.runtime.nodes.node_health import NodeHealth
from hv_batch.runtime.nodes.resources import actor_bundle, alive_nodes, can_place, group_bundles

logger = logging.getLogger(__name__)

_NAMES = {Stage.ENCODE: "encoders", Stage.DENOISE: "groups", Stage.DECODE: "decoders"}


class NodeExclusion:
    """One for all actors of a run. Nodes are Ray's ids."""

    def __init__(self, run: ResolvedRun) -> None:
        self._health = NodeHealth(self._can_spare)
        self._group = group_bundles(run, run.groups.largest)
        pools: dict[Stage, EncodersConfig | DecodersConfig]
        pools = {Stage.ENCODE: run.config.encoders, Stage.DECODE: run.config.decoders}
        self._singles = {stage: [actor_bundle(pool.cpus, pool.gpus)] for stage, pool in pools.items() if pool.gpus}
        self._names: dict[str, str] = {}  # of nodes that were blamed, which may be gone when they are told of

    @property
    def excluded(self) -> frozenset[str]:
        return self._health.excluded

    def reasons(self) -> dict[str, str]:
        """The excluded nodes, as people know them, each with what was too much."""
        return {self._name(node): reason for node, reason in self._health.reasons.items()}

    def avoided(self, stage: Stage) -> frozenset[str]:
        """Where no actor of the stage is to be placed now."""
        if self.excluded and stage is Stage.DENOISE and not self._can_spare(self.excluded, stage):
            pardoned = ", ".join(self._name(node) for node in sorted(self._health.pardon()))
            logger.warning(f"nothing else could host a group any more, so {pardoned} may be used again")
        if stage is Stage.DENOISE:
            return self.excluded
        is_sparable = self.excluded and stage in self._singles and self._can_spare(self.excluded, stage)
        return self.excluded if is_sparable else frozenset()

    def start_failed(self, stage: Stage, nodes: Iterable[str], reason: str) -> bool:
        """A worker failed to start because of these nodes; whether one of them is excluded for it."""
        return self._tell(self._health.start_failed, stage, nodes, f"{_NAMES[stage]} do not start there: {reason}")

    def device_faulted(self, stage: Stage, nodes: Iterable[str], reason: str) -> bool:
        """A device of these nodes broke under a sample; whether one of them is excluded for it."""
        return self._tell(self._health.device_faulted, stage, nodes, f"its device fails: {reason}")

    def started(self, stage: Stage, nodes: Iterable[str]) -> None:
        self._health.started(stage, nodes)

    def worked(self, stage: Stage, nodes: Iterable[str]) -> None:
        self._health.worked(stage, nodes)

    def _can_spare(self, nodes: frozenset[str], stage: Stage) -> bool:
        bill = [self._group] if stage is Stage.DENOISE else [self._group, *self._singles.values()]
        return can_place(bill, [resources for node, resources in alive_nodes().items() if node not in nodes])

    def _tell(
        self, blame: Callable[[Stage, Iterable[str], str], list[str]], stage: Stage, nodes: Iterable[str], why: str
    ) -> bool:
        if stage is not Stage.DENOISE and stage not in self._singles:
            return False
        before, why = self.excluded, why.strip().partition("\n")[0]
        whom = "a group" if stage is Stage.DENOISE else f"a group and the {_NAMES[stage]}"
        for node in blame(stage, nodes, why):
            logger.warning(f"{self._name(node)} fails again and again, but no other node could host {whom}: it stays")
        for node in sorted(self.excluded - before):
            logger.warning(f"{self._name(node)} is excluded for the rest of this run: {why}")
        return self.excluded != before

    def _name(self, node: str) -> str:
        """The node's address and the beginning of Ray's id: one address may have several nodes."""
        if node not in self._names:
            addresses = {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes()}
            self._names[node] = f"node {addresses.get(node, 'unknown')} ({node[:8]})"
        return self._names[node]
