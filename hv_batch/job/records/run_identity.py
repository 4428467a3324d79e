"""The identity of a run: every part of its config that changes pixels or keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.group_plan import fixed_plan
from hv_batch.job.workload import shape_name
from hv_batch.protocol import ParallelPlan, Shape


def run_identity(config: RunConfig, plans: Mapping[Shape, ParallelPlan] | None = None) -> dict[str, Any]:
    """The part of a config that changes pixels or keys, as JSON values, without the engine's own `identity()` (P3).

    `plans` are the parallel plans of the manifest's shapes. With `gpus_per_group: auto` they are part of the identity.
    """
    return {
        "seed": config.seed,
        "engine": config.model.engine,
        "defaults": config.defaults.model_dump(mode="json"),
        "parallel": parallel_identity(config, plans or {}),
        "media": config.media.model_dump(mode="json"),
        "shard_size": config.output.shard_size,
        "webdataset": config.output.webdataset,
    }


def parallel_identity(config: RunConfig, by_shape: Mapping[Shape, ParallelPlan]) -> dict[str, Any]:
    """The resolved parallel plan, or that of each shape.

    It is resolved, so that neither a new default nor a new cost model can change an existing run.
    """
    device = {"device": config.parallel.device}
    if plan := fixed_plan(config):
        degrees = asdict(plan)
        if plan.cfg_degree == 1:  # a later key; without it, the identity of older output roots stays the same
            del degrees["cfg_degree"]
        return device | degrees
    return device | {"plans": {shape_name(shape): asdict(plan) for shape, plan in by_shape.items()}}


def recorded_plans(identity: Mapping[str, Any]) -> dict[Shape, ParallelPlan]:
    """The plan of each shape in a run's identity, from `parallel_identity`; empty if all shapes share one plan."""
    plans = identity.get("parallel", {}).get("plans", {})
    return {_read_shape(name): ParallelPlan(**degrees) for name, degrees in plans.items()}


def _read_shape(name: str) -> Shape:
    height, width, frames = map(int, name.split("x"))
    return height, width, frames
