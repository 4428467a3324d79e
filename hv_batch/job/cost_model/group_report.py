"""The parts of `hv-batch plan` about group sizes: the plan of each shape, and whether `cfg_degree: 2` is cheaper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from hv_batch.job.config.hardware import Gpu
from hv_batch.job.cost_model.flops import plan_ranks
from hv_batch.job.cost_model.group_plan import explain_choice
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.cost_model.speed import denoise_seconds
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan
from hv_batch.sampling_params import Shape

HOUR_S = 3600

Report = dict[str, Any]


def rank_seconds(gpu: Gpu, model: ModelShape, kind: Workload, plan: ParallelPlan) -> float:
    """GPU seconds of one denoise: its duration times the ranks of the group."""
    return denoise_seconds(gpu, model, kind, plan) * plan.world_size


def report_sizes(run: ResolvedRun, work: Counter[Workload], gpu: Gpu) -> list[Report]:
    """For every shape: the plan of its group, why that one, and what it costs."""

    def report(shape: Shape) -> Report:
        plan = run.groups.by_shape[shape]
        of_shape = Counter({kind: count for kind, count in work.items() if kind.shape == shape})
        seconds = _total(of_shape, lambda kind: denoise_seconds(gpu, run.model, kind, plan))
        return {
            "shape": list(shape),
            "samples": of_shape.total(),
            "ranks": plan.world_size,
            "group": str(plan),
            "why": explain_choice(run, shape),
            "seconds_a_sample": seconds / of_shape.total(),
            "gpu_hours": seconds * plan.world_size / HOUR_S,
        }

    return [report(shape) for shape in sorted({kind.shape for kind in work})]


def report_halves(run: ResolvedRun, work: Counter[Workload], gpu: Gpu) -> Report | None:
    """GPU hours if each half of a group computed one guidance branch (`parallel.cfg_degree: 2`).

    None if that is impossible (a row without guidance, a group of an odd size or already halved) or not cheaper.
    """
    model, halved = run.model, {}
    for plan in run.groups.plans:
        if plan.cfg_degree > 1 or plan.world_size % 2 or any(kind.branches == 1 for kind in work):
            return None
        ulysses, ring = plan_ranks(model.dit.heads_num, plan.world_size // 2)
        halved[plan] = ParallelPlan(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=2)
    plans = run.groups.by_shape
    whole = _total(work, lambda kind: rank_seconds(gpu, model, kind, plans[kind.shape]))
    halves = _total(work, lambda kind: rank_seconds(gpu, model, kind, halved[plans[kind.shape]]))
    return {"gpu_hours": halves / HOUR_S, "instead_of": whole / HOUR_S} if halves < whole else None


def _total(work: Counter[Workload], seconds: Callable[[Workload], float]) -> float:
    return sum(count * seconds(kind) for kind, count in work.items())
