"""How many ranks render a video: the same for all, or for every shape the cheapest group that it fits into.

A group's ranks send each other what they compute, so of the sizes that fit, the smallest always costs the fewest GPU
seconds; a larger one buys memory and time. Both are bounds of a choice (`gpu_memory_gib`, `groups.max_sample_minutes`),
and the cost model (`hv_batch.job.cost_model.speed`) decides between what they leave. The choice is made once: another plan sums in
another order (P3), so a run keeps to the plans that its run.json names, whatever a later cost model would choose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hv_batch.job.config.colocation import rank_gpus
from hv_batch.job.config.group_rules import DEFAULT_PLAN, GROUP_SIZES
from hv_batch.job.config.hardware import find_gpu
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.flops import plan_ranks
from hv_batch.job.cost_model.memory import GIB, rank_footprint
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.speed import denoise_seconds
from hv_batch.job.workload import Workload, shape_name
from hv_batch.protocol import ParallelPlan, Shape, UserError


@dataclass(frozen=True, slots=True)
class GroupSizes:
    """What a run has decided. The plans of its groups, largest first: a size class is a place in this order."""

    plans: tuple[ParallelPlan, ...]
    by_shape: Mapping[Shape, ParallelPlan]

    @property
    def largest(self) -> ParallelPlan:
        return self.plans[0]

    def size_class(self, shape: Shape) -> int:
        return self.plans.index(self.by_shape[shape])

    def shapes(self, plan: ParallelPlan) -> list[Shape]:
        return [shape for shape, chosen in self.by_shape.items() if chosen == plan]


def choose_sizes(
    config: RunConfig, shapes: Iterable[Shape], recorded: Mapping[Shape, ParallelPlan] | None = None
) -> GroupSizes:
    """The plan of every shape; what an earlier command of the same run has `recorded` of them stays.

    Raises UserError that names every shape which fits into no group. The engine must have accepted the config's
    options.
    """
    if plan := fixed_plan(config):
        return GroupSizes((plan,), dict.fromkeys(shapes, plan))
    model, kept = ModelShape.from_options(config.model.options), recorded or {}
    by_shape, found = {}, []
    for shape in sorted(shapes):
        plan = kept.get(shape)
        if plan is None or plan.cfg_degree != config.parallel.cfg_degree:
            plan = _cheapest(config, model, shape)
        if plan:
            by_shape[shape] = plan
        else:
            found.append(_misfit(config, model, shape))
    if found:
        raise UserError("This run does not fit into GPU memory:\n" + "\n".join(f"  - {line}" for line in found))
    return GroupSizes(tuple(sorted(set(by_shape.values()), key=lambda plan: -plan.world_size)), by_shape)


def plan_for(config: RunConfig, shape: Shape) -> ParallelPlan:
    """The plan by which a new run renders videos of this shape. Raises UserError as `choose_sizes`."""
    return choose_sizes(config, [shape]).largest


def fixed_plan(config: RunConfig) -> ParallelPlan | None:
    """The plan of every shape; None where each has its own."""
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
    return _share_out(config, ModelShape.from_options(config.model.options), parallel.gpus_per_group)


def _share_out(config: RunConfig, model: ModelShape, ranks: int) -> ParallelPlan:
    """As much Ulysses as the heads allow and a node holds. Of another engine, the released model's heads are assumed:
    it is asked whether it takes the plan before anything starts.
    """
    cfg, nodes = config.parallel.cfg_degree, config.groups.nodes_per_group
    ulysses, ring = plan_ranks(model.dit.heads_num, ranks // cfg, ring_multiple=nodes // math.gcd(nodes, cfg))
    return ParallelPlan(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg)


@dataclass(frozen=True, slots=True)
class _Option:
    """What one group size would mean for one shape."""

    plan: ParallelPlan
    need: int  # bytes on each rank
    fits: bool
    seconds: float  # of a denoise


def _weigh(config: RunConfig, model: ModelShape, shape: Shape) -> list[_Option]:
    """Smallest first.

    Rows of one shape may differ in steps and guidance, and still have one plan: those of the config's defaults count.
    """
    cfg, defaults = config.parallel.cfg_degree, config.defaults
    gpu = find_gpu(str(config.gpu))
    work = Workload(shape, defaults.num_inference_steps, 2 if cfg > 1 or defaults.cfg_scale > 1 else 1)
    room = (config.gpu_memory_gib or 0.0) * _share(config) * GIB
    decodes = config.decoders.placement == "group"
    options = []
    for plan in (_share_out(config, model, ranks) for ranks in GROUP_SIZES if ranks % cfg == 0):
        need = rank_footprint(model, shape, plan.ulysses_degree, plan.ring_degree, decodes=decodes).total
        options.append(_Option(plan, need, need <= room, denoise_seconds(gpu, model, work, plan)))
    return options


def _share(config: RunConfig) -> float:
    """Of a GPU, for a rank; on CPUs, where one tries it out, the whole of what the config tells."""
    return rank_gpus(config) if config.parallel.device == "cuda" else 1.0


def _limit_s(config: RunConfig) -> float:
    return 60 * (config.groups.max_sample_minutes or math.inf)


def _cheapest(config: RunConfig, model: ModelShape, shape: Shape) -> ParallelPlan | None:
    """By GPU seconds; None where not even the largest group is large enough."""
    fitting = [option for option in _weigh(config, model, shape) if option.fits]
    quick = [option for option in fitting if option.seconds <= _limit_s(config)]
    if quick:
        return min(quick, key=lambda option: option.seconds * option.plan.world_size).plan
    return min(fitting, key=lambda option: option.seconds).plan if fitting else None


def explain_choice(config: RunConfig, model: ModelShape, shape: Shape) -> str:
    """Why a shape has the group that it has, in a few words; empty where the config gives all the same."""
    if fixed_plan(config):
        return ""
    options, limit = _weigh(config, model, shape), f"{config.groups.max_sample_minutes or 0:g} min"
    chosen = next(option for option in options if option.plan == _cheapest(config, model, shape))
    if chosen.seconds > _limit_s(config):
        return f"the fastest, though it takes longer than {limit}"
    smaller = options[: options.index(chosen)]
    if not smaller:
        return "the cheapest"
    return f"smaller ones take longer than {limit}" if smaller[-1].fits else "smaller ones have not the memory"


def _misfit(config: RunConfig, model: ModelShape, shape: Shape) -> str:
    largest = _weigh(config, model, shape)[-1]
    return (
        f"{shape_name(shape)} needs about {largest.need / GIB:.1f} GiB on each rank of the largest group, of "
        f"{GROUP_SIZES[-1]}, and gpu_memory_gib = {config.gpu_memory_gib:g} with {_share(config):g} of a GPU for a "
        "rank; set model.options.offload to blocks, or render it smaller"
    )
