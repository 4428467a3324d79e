"""GPU seconds and prices of samples, by stage, shape and group size: a pure function of model, work, plan and GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hv_batch.job.config.group_rules import GROUP_SIZES
from hv_batch.job.config.hardware import Gpu
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.group_plan import choose_degrees
from hv_batch.job.cost_model.memory import GIB, rank_footprint
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.cost_model.speed import ENCODE_SECONDS, decode_seconds, denoise_seconds
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan

HOUR_S = 3600

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GpuSeconds:
    """What one sample costs at each stage, or many samples together."""

    encode: float
    denoise: float
    decode: float

    @property
    def total(self) -> float:
        return self.encode + self.denoise + self.decode

    @property
    def hours(self) -> float:
        return self.total / HOUR_S

    def shares(self) -> Report:
        return {name: getattr(self, name) / self.total for name in ("encode", "denoise", "decode")}


def group_sizes(config: RunConfig) -> list[int]:
    """The sizes that a group of the config can have: each node, and each guidance branch, has the same ranks."""
    parts = math.lcm(config.parallel.cfg_degree, config.groups.nodes_per_group)
    return [ranks for ranks in GROUP_SIZES if ranks % parts == 0]


def sample_gpu_seconds(
    gpu: Gpu, model: ModelShape, work: Workload, plan: ParallelPlan, *, groups_decode: bool
) -> GpuSeconds:
    """One sample on a group of that plan. An encoder or decoder occupies one GPU, a group that decodes all of its."""
    ranks = plan.world_size
    decoding = decode_seconds(gpu, model, work, ranks) * ranks if groups_decode else decode_seconds(gpu, model, work)
    return GpuSeconds(
        encode=work.branches * ENCODE_SECONDS,
        denoise=denoise_seconds(gpu, model, work, plan) * ranks,
        decode=decoding,
    )


def total_gpu_seconds(
    gpu: Gpu,
    model: ModelShape,
    work: Counter[Workload],
    plans: Mapping[Workload, ParallelPlan],
    *,
    groups_decode: bool,
) -> GpuSeconds:
    """All samples, each on a group of the plan of its workload."""
    each = [
        (count, sample_gpu_seconds(gpu, model, kind, plans[kind], groups_decode=groups_decode))
        for kind, count in work.items()
    ]
    return GpuSeconds(*(sum(count * getattr(cost, name) for count, cost in each) for name in GpuSeconds.__slots__))


def report_prices(run: ResolvedRun, work: Counter[Workload], gpu: Gpu, price: float | None) -> list[Report]:
    """The cost of a sample of each workload, in the config's group and by group size. Prices are null without one."""

    def cost(seconds: GpuSeconds) -> float | None:
        return None if price is None else price * seconds.hours

    def by_size(kind: Workload) -> list[Report]:
        reports = []
        for ranks in group_sizes(run.config):
            plan = choose_degrees(run.config, run.model, ranks)
            seconds = sample_gpu_seconds(gpu, run.model, kind, plan, groups_decode=run.groups_decode)
            need = rank_footprint(
                run.model, kind.shape, plan.ulysses_degree, plan.ring_degree, decodes=run.groups_decode
            ).total
            reports.append(
                {
                    "ranks": ranks,
                    "seconds": denoise_seconds(gpu, run.model, kind, plan),
                    "gpu_seconds": seconds.total,
                    "cost": cost(seconds),
                    "fits": need <= gpu.memory_gib * GIB,
                }
            )
        return reports

    reports = []
    for kind, count in sorted(work.items()):
        plan = run.groups.by_shape[kind.shape]
        seconds = sample_gpu_seconds(gpu, run.model, kind, plan, groups_decode=run.groups_decode)
        reports.append(
            {
                "shape": list(kind.shape),
                "steps": kind.steps,
                "cfg": kind.branches == 2,
                "samples": count,
                "ranks": plan.world_size,
                "gpu_seconds": seconds.total,
                "shares": seconds.shares(),
                "cost": cost(seconds),
                "group_sizes": by_size(kind),
            }
        )
    return reports
