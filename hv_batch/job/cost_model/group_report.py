"""What `hv-batch plan` tells of group sizes: which shape gets which and why, and whether halves would be cheaper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from hv_batch.job.config.hardware import Gpu
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.flops import plan_ranks
from hv_batch.job.cost_model.group_plan import GroupSizes, explain_choice
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.speed import denoise_seconds
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan, Shape

HOUR_S = 3600

Report = dict[str, Any]


def rank_seconds(gpu: Gpu, model: ModelShape, kind: Workload, plan: ParallelPlan) -> float:
    """Of all ranks of a group together, for one sample: what it costs."""
    return denoise_seconds(gpu, model, kind, plan) * plan.world_size


def report_sizes(
    config: RunConfig, sizes: GroupSizes, model: ModelShape, work: Counter[Workload], gpu: Gpu
) -> list[Report]:
    """Of every shape, the group that renders it, why that one, and what it costs."""

    def report(shape: Shape) -> Report:
        plan, own = sizes.by_shape[shape], Counter({kind: n for kind, n in work.items() if kind.shape == shape})
        seconds = _total(own, lambda kind: denoise_seconds(gpu, model, kind, plan))
        return {
            "shape": list(shape),
            "samples": own.total(),
            "ranks": plan.world_size,
            "group": str(plan),
            "why": explain_choice(config, model, shape),
            "seconds_a_sample": seconds / own.total(),
            "gpu_hours": seconds * plan.world_size / HOUR_S,
        }

    return [report(shape) for shape in sorted({kind.shape for kind in work})]


def report_halves(sizes: GroupSizes, model: ModelShape, work: Counter[Workload], gpu: Gpu) -> Report | None:
    """What groups of the same sizes would cost in halves, one for each guidance branch; None where that is not to be
    had (a row without guidance, a group that has no halves) or not cheaper.
    """
    halved = {}
    for plan in sizes.plans:
        if plan.cfg_degree > 1 or plan.world_size % 2 or any(kind.branches == 1 for kind in work):
            return None
        ulysses, ring = plan_ranks(model.dit.heads_num, plan.world_size // 2)
        halved[plan] = ParallelPlan(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=2)
    whole = _total(work, lambda kind: rank_seconds(gpu, model, kind, sizes.by_shape[kind.shape]))
    halves = _total(work, lambda kind: rank_seconds(gpu, model, kind, halved[sizes.by_shape[kind.shape]]))
    return {"gpu_hours": halves / HOUR_S, "instead_of": whole / HOUR_S} if halves < whole else None


def _total(work: Counter[Workload], seconds: Callable[[Workload], float]) -> float:
    return sum(count * seconds(kind) for kind, count in work.items())
