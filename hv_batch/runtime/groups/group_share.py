"""Bounds the GPUs of a run to a share of the cluster (`groups.max_share`), so that several runs share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.protocol import ParallelPlan
from hv_batch.runtime.nodes.resources import Bundle, group_bundles, total


class GroupShare:
    """Decides whether another group may ask for resources. Without `groups.max_share`, it always may.

    What is shared is the GPUs, or the CPUs if groups use none. Encoders and decoders count with the number that the
    config gives them, or one if that is `auto`. They are not bounded themselves: without them, groups would only wait.
    """

    def __init__(self, run: ResolvedRun) -> None:
        self._run = run
        self._share = run.config.groups.max_share
        self._resource = "GPU" if run.config.groups.gpus_per_rank else "CPU"
        self._pools = sum(
            (pool.gpus if self._resource == "GPU" else pool.cpus) * (1 if pool.count == "auto" else pool.count)
            for pool in run.pools.values()
        )

    def admits(self, plan: ParallelPlan, held: Iterable[ParallelPlan], nodes: Iterable[Mapping[str, float]]) -> bool:
        """Whether a group of `plan` may ask for resources while those of `held` have or await theirs.

        The first group always may: a share that is too small for one would otherwise end the run without a result.
        """
        if self._share is None:
            return True
        taken = sum(map(self._need, held))
        return not taken or taken + self._need(plan) + self._pools <= self._allowed(nodes) + 1e-9

    def describe(self, nodes: Iterable[Mapping[str, float]]) -> str:
        """For a log line: the bound, and what it is a share of."""
        nodes = list(nodes)
        return (
            f"groups.max_share = {self._share:g} allows this run {self._allowed(nodes):g} of the cluster's "
            f"{_sum(nodes, self._resource):g} {self._resource}s"
        )

    def _allowed(self, nodes: Iterable[Mapping[str, float]]) -> float:
        return (self._share or 1.0) * _sum(nodes, self._resource)

    def _need(self, plan: ParallelPlan) -> float:
        bundles: list[Bundle] = group_bundles(self._run, plan)
        return total(bundles).get(self._resource, 0.0)


def _sum(nodes: Iterable[Mapping[str, float]], resource: str) -> float:
    return sum(node.get(resource, 0.0) for node in nodes)
