"""Resolves a run config: the one place where its keys are turned into decisions (see `ResolvedRun`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import ENGINE
from hv_batch.job.cost_model.group_plan import choose_plans, fixed_plan
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.resolved_run import GroupPlans, ResolvedRun
from hv_batch.protocol import ParallelPlan
from hv_batch.sampling_params import Shape


def resolve_run(
    config: RunConfig, shapes: Collection[Shape] = (), recorded: Mapping[Shape, ParallelPlan] | None = None
) -> ResolvedRun:
    """Resolve `config` for a manifest of these shapes, given as (height, width, frames).

    `recorded` are the plans in the run.json of an earlier command of the same run: their shapes keep them. Without
    shapes, as before the manifest is read, the result has the fixed plan if there is one, and no plans if not.

    The engine must have accepted the config's options. Raises UserError that names every shape for which no group size
    has enough memory.
    """
    model = _model_shape(config)
    plan = fixed_plan(config, model)
    run = ResolvedRun(
        config=config,
        model=model,
        fixed_plan=plan,
        groups=GroupPlans((plan,) if plan else (), dict.fromkeys(shapes, plan) if plan else {}),
        groups_decode=config.decoders.is_in_group,
        rank_gpus=_rank_gpus(config),
    )
    return run if plan or not shapes else replace(run, groups=choose_plans(run, shapes, recorded or {}))


def _model_shape(config: RunConfig) -> ModelShape:
    """The options of another engine may mean anything. They are read only if degrees have to be chosen for a group."""
    parallel = config.parallel
    degrees_are_open = parallel.gpus_per_group is not None and not (parallel.ulysses_degree or parallel.ring_degree)
    if config.model.engine != ENGINE and not degrees_are_open:
        return ModelShape()
    return ModelShape.from_options(config.model.options)


def _rank_gpus(config: RunConfig) -> float:
    encoder = config.encoders.gpus if config.encoders.is_colocated else 0.0
    return round(config.groups.gpus_per_rank - encoder, 4)  # Ray's resolution of resource amounts
