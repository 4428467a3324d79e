"""What follows from a run's config: decided once, before any worker starts, and read everywhere after that.

`hv_batch.job.cost_model.resolver` makes a `ResolvedRun`. Code that runs after preflight reads plain values from
`ResolvedRun.config`, and asks the `ResolvedRun` for everything that depends on several keys or on the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hv_batch.job.config.group_rules import max_ranks
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import DecodersConfig, EncodersConfig
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.scheduling.capacity import stage_limits
from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan
from hv_batch.sampling_params import Shape

# Upper bound of an `auto` pool, in workers per group. Encoding is a small part of a denoise, even of an image. A decode
# may take longer than a denoise of few steps on eight GPUs. If it takes more than twice as long, uploads or disks are
# slow, and more decoders would only wait as well.
MAX_AUTO_WORKERS_PER_GROUP = {Stage.ENCODE: 1, Stage.DECODE: 2}


@dataclass(frozen=True, slots=True)
class GroupPlans:
    """The parallel plans of a run's groups.

    `plans` are distinct and sorted by world size, largest first: the index of a plan is its size class. `by_shape` maps
    every shape of the manifest to its plan.
    """

    plans: tuple[ParallelPlan, ...]
    by_shape: Mapping[Shape, ParallelPlan]

    @property
    def largest(self) -> ParallelPlan:
        return self.plans[0]

    def size_class(self, shape: Shape) -> int:
        return self.plans.index(self.by_shape[shape])

    def shapes(self, plan: ParallelPlan) -> list[Shape]:
        return [shape for shape, chosen in self.by_shape.items() if chosen == plan]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """A config and everything that follows from it, the manifest's shapes and the plans recorded in run.json.

    `groups.plans` must not be empty, except before the manifest's shapes are known (see `resolve_run`).
    """

    config: RunConfig
    model: ModelShape
    """The widths and precisions of the model; those of the release if the engine is another one."""
    fixed_plan: ParallelPlan | None
    """The plan of every shape; None if each shape has its own (`gpus_per_group: auto`)."""
    groups: GroupPlans
    groups_decode: bool
    """Whether the ranks of the groups decode, so that there are no decoder actors."""
    rank_gpus: float
    """The share of a GPU that Ray reserves for a rank. Less than `groups.gpus_per_rank` by the share of a colocated
    encoder: all ranks leave it free, because Ray chooses the GPU of an encoder."""

    @property
    def pools(self) -> dict[Stage, EncodersConfig | DecodersConfig]:
        """The stages whose actors reserve resources of their own, outside the groups."""
        pools: dict[Stage, EncodersConfig | DecodersConfig] = {}
        if not self.config.encoders.is_colocated:
            pools[Stage.ENCODE] = self.config.encoders
        if not self.groups_decode:
            pools[Stage.DECODE] = self.config.decoders
        return pools

    @property
    def max_groups(self) -> int:
        """Groups that may exist at a time, if all are of the smallest size."""
        count, plans = self.config.groups.count, self.groups.plans
        return count * plans[0].world_size // plans[-1].world_size

    @property
    def max_workers(self) -> dict[Stage, int]:
        """Workers that a stage may have at a time, if all groups are of the smallest size."""
        groups, workers = self.config.groups, self._pool_sizes(self.max_groups)
        if self.groups_decode:
            workers[Stage.DECODE] = 0
        if self.config.encoders.is_colocated:
            room = self.colocated_per_node * groups.count * groups.nodes_per_group
            workers[Stage.ENCODE] = min(workers[Stage.ENCODE], room)
        return workers | {Stage.DENOISE: self.max_groups}

    @property
    def colocated_per_node(self) -> int:
        """Colocated encoders that a node of a group may hold: at most one per GPU that the group has there."""
        if not self.config.encoders.is_colocated:
            return 0
        groups = self.config.groups
        wanted = self._pool_sizes(groups.count)[Stage.ENCODE]
        return min(
            max_ranks(self.config.parallel) // groups.nodes_per_group,
            -(-wanted // (groups.count * groups.nodes_per_group)),
        )

    def ranks_per_node(self, plan: ParallelPlan) -> int:
        return plan.world_size // self.config.groups.nodes_per_group

    def stage_limits(self, result_bytes: Mapping[Stage, float]) -> dict[Stage, StageLimits]:
        """The scheduler's limits; `result_bytes` as for `scheduling.capacity.stage_limits`."""
        return stage_limits(self.config, self.max_workers, self.groups.plans, result_bytes)

    def _pool_sizes(self, groups: int) -> dict[Stage, int]:
        counts = {Stage.ENCODE: self.config.encoders.count, Stage.DECODE: self.config.decoders.count}
        return {
            stage: MAX_AUTO_WORKERS_PER_GROUP[stage] * groups if count == "auto" else count
            for stage, count in counts.items()
        }
