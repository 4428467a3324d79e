"""The setup that `hv-batch plan` recommends: group size, encoders and decoders for the GPUs of the config, and options.

Variants of the model's options are compared by the GPU hours of the whole manifest. An exact variant gives the same
accuracy; the others change pixels, and their quality must be checked on some samples first.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hv_batch.attention_kernels import AUTO, assumed_kernel
from hv_batch.attention_methods import (
    ALL_DENSE,
    QUANTIZED_BACKENDS,
    AttentionMethods,
    QuantizedAttention,
    SparseAttention,
)
from hv_batch.job.config.hardware import Gpu
from hv_batch.job.cost_model.group_plan import choose_degrees
from hv_batch.job.cost_model.memory import GIB, rank_footprint
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.cost_model.sample_cost import HOUR_S, GpuSeconds, group_sizes, total_gpu_seconds
from hv_batch.job.cost_model.speed import denoise_seconds
from hv_batch.job.scheduling.pool_sizing import workers_needed
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan
from hv_batch.step_schedule import StepSchedule

COMPUTED = (23, 16)  # of 50 steps: those of published schedules, and fewer
DENSITY = 0.3
CFG_UNTIL = 0.5  # the fraction of the steps with a negative branch
QK = "int8"
MIN_STEPS = 20  # of fewer steps, as those of distilled weights, none can be left out

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """Options of the model that differ from those of the config."""

    name: str
    model: ModelShape
    overrides: tuple[str, ...] = ()
    is_exact: bool = True


def recommend(run: ResolvedRun, work: Counter[Workload], gpu: Gpu, gpus: float, price: float | None) -> Report:
    """The variants with their setups for `gpus` GPUs, and the cheapest one that is exact."""
    reports = [_report(run, variant, work, gpu, gpus, price) for variant in variants(run.model, work, gpu)]
    exact = [report for report in reports if report["exact"] and report["setup"]]
    best = min(exact, key=lambda report: report["gpu_hours"], default=None)
    return {"gpus": gpus, "variants": reports, "best_exact": best and best["name"]}


def variants(model: ModelShape, work: Counter[Workload], gpu: Gpu) -> Iterator[Variant]:
    """The options as they are; the fastest kernel that needs no package; and with it the methods that save work."""
    yield Variant("as configured", model)
    fast = model
    overrides: tuple[str, ...] = ()
    kernel = assumed_kernel(AUTO, gpu.capability, is_half=model.precision != "fp32")
    if kernel != model.attention and _gains(model, kernel, work, gpu):
        fast, overrides = replace(model, attention=kernel), (f"model.options.attention={kernel}",)
        yield Variant(f"attention {kernel}", fast, overrides)
    if min(kind.steps for kind in work) < MIN_STEPS:
        return
    # Methods of attention cannot be combined with each other, so none is proposed beside one of the config.
    attention = dict(_attention_methods(gpu)) if model.methods == ALL_DENSE else {}
    caches = COMPUTED if model.step_cache is None else ()
    for computed in caches:
        cached = replace(fast, step_cache=StepSchedule(computed=computed))
        name = f"step cache, {computed} of 50"
        with_cache = (*overrides, f"model.options.step_cache={{kind: schedule, computed: {computed}}}")
        yield Variant(name, cached, with_cache, is_exact=False)
        for method, (methods, option) in attention.items():
            yield Variant(f"{name}, {method}", replace(cached, methods=methods), (*with_cache, option), is_exact=False)
    for method, (methods, option) in attention.items():
        yield Variant(method, replace(fast, methods=methods), (*overrides, option), is_exact=False)
    if model.cfg_until is None and any(kind.branches > 1 for kind in work):
        gated = (*overrides, f"model.options.cfg_until={CFG_UNTIL}")
        yield Variant(f"CFG for {CFG_UNTIL} of the steps", replace(fast, cfg_until=CFG_UNTIL), gated, is_exact=False)


def _attention_methods(gpu: Gpu) -> Iterator[tuple[str, tuple[AttentionMethods, str]]]:
    """Name, methods and override of each method that saves time on this GPU."""
    sparse = SparseAttention(density=DENSITY)
    yield f"sparse {DENSITY}", (AttentionMethods(sparse), f"model.options.sparse_attention={{density: {DENSITY}}}")
    if gpu.quantized_gain > 1:
        quantized = QuantizedAttention(qk=QK, backend=QUANTIZED_BACKENDS[QK][0])
        option = f"model.options.quantized_attention={{qk: {QK}}}"
        yield "8-bit attention", (AttentionMethods(quantized=quantized), option)


def _gains(model: ModelShape, kernel: str, work: Counter[Workload], gpu: Gpu) -> bool:
    kind = max(work, key=lambda kind: kind.tokens)
    before, after = (
        denoise_seconds(gpu, each, kind, ParallelPlan()) for each in (model, replace(model, attention=kernel))
    )
    return after < before


def _report(
    run: ResolvedRun, variant: Variant, work: Counter[Workload], gpu: Gpu, gpus: float, price: float | None
) -> Report:
    plan = _group(run, variant.model, work, gpu)
    report: Report = {"name": variant.name, "exact": variant.is_exact, "overrides": list(variant.overrides)}
    if plan is None:
        return report | {"ranks": None, "gpu_hours": None, "cost": None, "cost_a_sample": None, "setup": None}
    plans = dict.fromkeys(work, plan)
    seconds = total_gpu_seconds(gpu, variant.model, work, plans, groups_decode=run.groups_decode)
    cost = None if price is None else price * seconds.hours
    return report | {
        "ranks": plan.world_size,
        "gpu_hours": seconds.hours,
        "shares": seconds.shares(),
        "cost": cost,
        "cost_a_sample": None if cost is None else cost / work.total(),
        "setup": _setup(run, plan, seconds, gpus),
    }


def _group(run: ResolvedRun, model: ModelShape, work: Counter[Workload], gpu: Gpu) -> ParallelPlan | None:
    """The smallest group that has the memory for every shape, and keeps `groups.max_sample_minutes` if any group does.

    The smallest one is the cheapest: larger ones spend time on communication. None if no group has the memory.
    """
    config = run.config
    limit_s = 60 * (config.groups.max_sample_minutes or math.inf)
    plans = [choose_degrees(config, model, ranks) for ranks in group_sizes(config)]
    fitting = [plan for plan in plans if all(_fits(run, model, kind, plan, gpu) for kind in work)]
    quick = [plan for plan in fitting if all(denoise_seconds(gpu, model, kind, plan) <= limit_s for kind in work)]
    if quick:
        return quick[0]
    return fitting[-1] if fitting else None


def _fits(run: ResolvedRun, model: ModelShape, kind: Workload, plan: ParallelPlan, gpu: Gpu) -> bool:
    need = rank_footprint(model, kind.shape, plan.ulysses_degree, plan.ring_degree, decodes=run.groups_decode)
    return need.total <= gpu.memory_gib * GIB


def _setup(run: ResolvedRun, plan: ParallelPlan, seconds: GpuSeconds, gpus: float) -> Report | None:
    """The most groups for which the GPUs suffice with the encoders and decoders that keep them busy; None if none."""
    config, ranks = run.config, plan.world_size
    encoder_gpus = 0.0 if config.encoders.is_colocated else config.encoders.gpus
    decoder_gpus = 0.0 if run.groups_decode else config.decoders.gpus
    in_group = (seconds.denoise + (seconds.decode if run.groups_decode else 0.0)) / ranks

    def pools(groups: int) -> tuple[int, int, float]:
        """Encoders, decoders, and the GPUs of all workers, which grow with the groups."""
        encoders = max(1, math.ceil(workers_needed(groups, in_group, seconds.encode)))
        decoders = 0 if run.groups_decode else max(1, math.ceil(workers_needed(groups, in_group, seconds.decode)))
        return encoders, decoders, groups * ranks + encoders * encoder_gpus + decoders * decoder_gpus

    groups = bisect_right(range(1, int(gpus // ranks) + 1), gpus + 1e-6, key=lambda count: pools(count)[2])
    if groups == 0:
        return None
    encoders, decoders, used = pools(groups)
    overrides = [f"parallel.gpus_per_group={ranks}", f"groups.count={groups}", f"encoders.count={encoders}"]
    overrides += [f"decoders.count={decoders}"] if decoders else []
    return {
        "groups": groups,
        "encoders": encoders,
        "decoders": decoders,
        "gpus": used,
        "hours": in_group / groups / HOUR_S,
        "overrides": overrides,
    }
