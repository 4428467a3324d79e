"""Excludes failing nodes from a run: it records failures, selects the nodes that an actor must avoid, and logs changes.

`node_health` decides which nodes are excluded. Groups avoid all excluded nodes. Encoders and decoders with GPUs avoid
them if the other nodes can host one of each stage; otherwise a run whose only spare GPU is on an excluded node would
wait forever. A pool without GPUs avoids the nodes that failed for this pool: a broken ffmpeg says nothing about the
GPUs of its node, nor these about the ffmpeg.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from hv_batch.job.config.sections import DecodersConfig, EncodersConfig
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.stages import Stage
from hv_batch.runtime.nodes.cluster_view import ClusterView
from hv_batch.runtime.nodes.node_health import NodeHealth
from hv_batch.runtime.nodes.resources import actor_bundle, can_place, group_bundles

logger = logging.getLogger(__name__)

_NAMES = {Stage.ENCODE: "encoders", Stage.DENOISE: "groups", Stage.DECODE: "decoders"}


class NodeExclusion:
    """One for all actors of a run. Nodes are Ray's ids."""

    def __init__(self, run: ResolvedRun, cluster: ClusterView) -> None:
        self._cluster = cluster
        self._health = NodeHealth(self._can_spare)
        self._group = group_bundles(run, run.groups.largest)
        pools: dict[Stage, EncodersConfig | DecodersConfig]
        pools = {Stage.ENCODE: run.config.encoders, Stage.DECODE: run.config.decoders}
        bundles = {stage: [actor_bundle(pool.cpus, pool.gpus)] for stage, pool in pools.items()}
        self._singles = {stage: bundles[stage] for stage, pool in pools.items() if pool.gpus}
        self._cpu_singles = {stage: bundles[stage] for stage, pool in pools.items() if not pool.gpus}
        self._cpu_health = {stage: NodeHealth(self._can_spare_for_cpus) for stage in self._cpu_singles}
        self._names: dict[str, str] = {}  # of nodes with failures, which may have left the cluster when they are logged

    @property
    def excluded(self) -> frozenset[str]:
        return self._health.excluded

    def reasons(self) -> dict[str, str]:
        """The names of the excluded nodes, each with the failure that excluded it."""
        each = [*self._cpu_health.values(), self._health]
        return {self._name(node): reason for health in each for node, reason in health.reasons.items()}

    def avoided(self, stage: Stage) -> frozenset[str]:
        """The nodes on which no actor of the stage may be placed now.

        Readmits all nodes if no other node could host a group.
        """
        if self.excluded and stage is Stage.DENOISE and not self._can_spare(self.excluded, stage):
            readmitted = ", ".join(self._name(node) for node in sorted(self._health.readmit()))
            logger.warning(f"no other node can host a group any more: {readmitted} may be used again")
        if stage is Stage.DENOISE:
            return self.excluded
        if stage in self._cpu_health:
            health = self._cpu_health[stage]
            return health.excluded if self._can_spare_for_cpus(health.excluded, stage) else frozenset()
        is_sparable = self.excluded and stage in self._singles and self._can_spare(self.excluded, stage)
        return self.excluded if is_sparable else frozenset()

    def start_failed(self, stage: Stage, nodes: Iterable[str], reason: str) -> bool:
        """Record that a worker failed to start because of these nodes. Returns whether one of them is now excluded."""
        why = f"{_NAMES[stage]} do not start there: {reason}"
        return self._record(self._health_of(stage).start_failed, stage, nodes, why)

    def device_faulted(self, stage: Stage, nodes: Iterable[str], reason: str) -> bool:
        """Record that a device of these nodes failed in a task. Returns whether one of them is now excluded."""
        return self._record(self._health_of(stage).device_faulted, stage, nodes, f"its device fails: {reason}")

    def tool_failed(self, stage: Stage, nodes: Iterable[str], reason: str) -> bool:
        """Record that a program or a disk of these nodes failed in a task. Returns as `device_faulted`."""
        return self._record(self._health_of(stage).device_faulted, stage, nodes, f"its tools fail: {reason}")

    def started(self, stage: Stage, nodes: Iterable[str]) -> None:
        self._health_of(stage).started(stage, nodes)

    def worked(self, stage: Stage, nodes: Iterable[str]) -> None:
        self._health_of(stage).worked(stage, nodes)

    def _health_of(self, stage: Stage) -> NodeHealth:
        return self._cpu_health.get(stage, self._health)

    def _can_spare(self, nodes: frozenset[str], stage: Stage) -> bool:
        needed = [self._group] if stage is Stage.DENOISE else [self._group, *self._singles.values()]
        return can_place(needed, [resources for node, resources in self._cluster.alive().items() if node not in nodes])

    def _can_spare_for_cpus(self, nodes: frozenset[str], stage: Stage) -> bool:
        """Whether one actor of a pool without GPUs fits on another node, beside a group and the other pools."""
        others = [bundle for each, bundle in (self._singles | self._cpu_singles).items() if each is not stage]
        everything = self._cluster.alive()
        for chosen in everything.keys() - nodes:
            (need,) = self._cpu_singles[stage]
            left = {name: amount - need.get(name, 0.0) for name, amount in everything[chosen].items()}
            rest = [left if node == chosen else resources for node, resources in everything.items()]
            if min(left.values(), default=0.0) >= -1e-9 and can_place([self._group, *others], rest):
                return True
        return False

    def _record(
        self, count: Callable[[Stage, Iterable[str], str], list[str]], stage: Stage, nodes: Iterable[str], why: str
    ) -> bool:
        health = self._health_of(stage)
        before, why = health.excluded, why.strip().partition("\n")[0]
        needed = "a group" if stage is Stage.DENOISE else f"a group and the {_NAMES[stage]}"
        for node in count(stage, nodes, why):
            logger.warning(f"{self._name(node)} fails repeatedly, but no other node can host {needed}: it stays in use")
        for node in sorted(health.excluded - before):
            scope = f"the {_NAMES[stage]} of this run" if stage in self._cpu_health else "the rest of this run"
            logger.warning(f"{self._name(node)} is excluded for {scope}: {why}")
        return health.excluded != before

    def _name(self, node: str) -> str:
        """The node's address and the first characters of its Ray id, because one address may have several nodes."""
        if node not in self._names:
            address = self._cluster.nodes().get(node, {}).get("NodeManagerAddress", "unknown")
            self._names[node] = f"node {address} ({node[:8]})"
        return self._names[node]
