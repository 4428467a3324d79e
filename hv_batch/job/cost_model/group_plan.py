"""Chooses the parallel plan of each shape: the same for all, or the cheapest group that has enough memory for it.

The ranks of a group exchange data, so among the sizes that fit, the smallest always costs the fewest GPU seconds. A
larger group buys memory and time. The config bounds both (`gpu_memory_gib`, `groups.max_sample_minutes`), and the cost
model (`hv_batch.job.cost_model.speed`) chooses among the sizes that remain.

Invariant: a run keeps the plans that its run.json records, whatever a later cost model would choose, because another
plan adds up in another order and changes bits (P3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hv_batch.job.config.group_rules import DEFAULT_PLAN, GROUP_SIZES
from hv_batch.job.config.hardware import find_gpu
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.flops import plan_ranks
from hv_batch.job.cost_model.memory import GIB, rank_footprint
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.resolved_run import GroupPlans, ResolvedRun
from hv_batch.job.cost_model.speed import denoise_seconds
from hv_batch.job.workload import Workload, shape_name
from hv_batch.protocol import ParallelPlan, UserError
from hv_batch.sampling_params import Shape


def fixed_plan(config: RunConfig, model: ModelShape) -> ParallelPlan | None:
    """The plan that the config gives to every shape; None for `gpus_per_group: auto`."""
    parallel = config.parallel
    ulysses, ring, cfg = parallel.ulysses_degree, parallel.ring_degree, parallel.cfg_degree
    if parallel.gpus_per_group == "auto":
        return None
    if parallel.gpus_per_group is None:
        return ParallelPlan(
            ulysses_degree=ulysses or DEFAULT_PLAN.ulysses_degree,
            ring_degree=ring or DEFAULT_PLAN.ring_degree,
            cfg_degree=cfg,
        )
    ranks = parallel.gpus_per_group // cfg
    if ulysses or ring:
        ulysses = ulysses or ranks // (ring or 1)
        return ParallelPlan(ulysses_degree=ulysses, ring_degree=ranks // ulysses, cfg_degree=cfg)
    return choose_degrees(config, model, parallel.gpus_per_group)


def choose_plans(run: ResolvedRun, shapes: Iterable[Shape], recorded: Mapping[Shape, ParallelPlan]) -> GroupPlans:
    """The plan of every shape for `gpus_per_group: auto`; does not read `run.groups`.

    A shape keeps its `recorded` plan if that has the config's cfg_degree. Raises UserError that names every shape for
    which no group size has enough memory.
    """
    by_shape, problems = {}, []
    for shape in sorted(shapes):
        plan = recorded.get(shape)
        if plan is None or plan.cfg_degree != run.config.parallel.cfg_degree:
            plan = _cheapest(run, shape)
        if plan:
            by_shape[shape] = plan
        else:
            problems.append(_too_large(run, shape))
    if problems:
        raise UserError("This run does not fit into GPU memory:\n" + "\n".join(f"  - {line}" for line in problems))
    return GroupPlans(tuple(sorted(set(by_shape.values()), key=lambda plan: -plan.world_size)), by_shape)


def choose_degrees(config: RunConfig, model: ModelShape, ranks: int) -> ParallelPlan:
    """The largest Ulysses degree that divides the heads and stays inside a node. For another engine, the released
    model's number of heads is assumed; the engine checks the plan before anything starts.
    """
    cfg, nodes = config.parallel.cfg_degree, config.groups.nodes_per_group
    ulysses, ring = plan_ranks(model.dit.heads_num, ranks // cfg, ring_multiple=nodes // math.gcd(nodes, cfg))
    return ParallelPlan(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg)


@dataclass(frozen=True, slots=True)
class _Option:
    """One group size for one shape."""

    plan: ParallelPlan
    bytes_per_rank: int
    fits: bool
    seconds: float  # of a denoise


def _options(run: ResolvedRun, shape: Shape) -> list[_Option]:
    """One option per group size, smallest first.

    Rows of one shape may differ in steps and guidance but share a plan, so the config's defaults are used for both.
    """
    config, model = run.config, run.model
    cfg, defaults = config.parallel.cfg_degree, config.defaults
    gpu = find_gpu(str(config.gpu))
    work = Workload(shape, defaults.num_inference_steps, 2 if cfg > 1 or defaults.cfg_scale > 1 else 1)
    available = (config.gpu_memory_gib or 0.0) * _memory_share(run) * GIB
    options = []
    for plan in (choose_degrees(config, model, ranks) for ranks in GROUP_SIZES if ranks % cfg == 0):
        need = rank_footprint(model, shape, plan.ulysses_degree, plan.ring_degree, decodes=run.groups_decode).total
        options.append(_Option(plan, need, need <= available, denoise_seconds(gpu, model, work, plan)))
    return options


def _memory_share(run: ResolvedRun) -> float:
    """The share of a GPU's memory that a rank may use. On CPUs, which serve for trials, a rank has all of it."""
    return run.rank_gpus if run.config.parallel.device == "cuda" else 1.0


def _limit_s(run: ResolvedRun) -> float:
    return 60 * (run.config.groups.max_sample_minutes or math.inf)


def _cheapest(run: ResolvedRun, shape: Shape) -> ParallelPlan | None:
    """The plan of the fewest GPU seconds; None if even the largest group has too little memory."""
    fitting = [option for option in _options(run, shape) if option.fits]
    quick = [option for option in fitting if option.seconds <= _limit_s(run)]
    if quick:
        return min(quick, key=lambda option: option.seconds * option.plan.world_size).plan
    return min(fitting, key=lambda option: option.seconds).plan if fitting else None


def explain_choice(run: ResolvedRun, shape: Shape) -> str:
    """Why `auto` chooses the plan of a shape, in a few words; empty if the config fixes the plan."""
    if run.fixed_plan:
        return ""
    options, limit = _options(run, shape), f"{run.config.groups.max_sample_minutes or 0:g} min"
    chosen = next(option for option in options if option.plan == _cheapest(run, shape))
    if chosen.seconds > _limit_s(run):
        return f"the fastest, although it takes longer than {limit}"
    smaller = options[: options.index(chosen)]
    if not smaller:
        return "the cheapest"
    return f"smaller groups take longer than {limit}" if smaller[-1].fits else "smaller groups have too little memory"


def _too_large(run: ResolvedRun, shape: Shape) -> str:
    largest = _options(run, shape)[-1]
    return (
        f"{shape_name(shape)} needs about {largest.bytes_per_rank / GIB:.1f} GiB on each rank of the largest group, of "
        f"{GROUP_SIZES[-1]}, and gpu_memory_gib = {run.config.gpu_memory_gib:g} with {_memory_share(run):g} of a GPU "
        "for a rank; set model.options.offload to blocks, or render it smaller"
    )
