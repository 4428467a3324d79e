"""What makes two runs the same: everything that changes pixels or keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hv_batch.job.cost_model.group_plan import fixed_plan
from hv_batch.job.workload import shape_name
from hv_batch.protocol import ParallelPlan, Shape

if TYPE_CHECKING:
    from hv_batch.job.config.run_config import RunConfig


def parallel_identity(config: RunConfig, by_shape: Mapping[Shape, ParallelPlan]) -> dict[str, Any]:
    """The plan, or that of every shape: resolved, so that neither a default nor a cost model can change a run."""
    device = {"device": config.parallel.device}
    if plan := fixed_plan(config):
        degrees = asdict(plan)
        if plan.cfg_degree == 1:  # a key that came later: roots of before remain what they were
            del degrees["cfg_degree"]
        return device | degrees
    return device | {"plans": {shape_name(shape): asdict(plan) for shape, plan in by_shape.items()}}


def recorded_plans(identity: Mapping[str, Any]) -> dict[Shape, ParallelPlan]:
    """What `parallel_identity` said of every shape in the identity of a run; nothing where all have one plan."""
    plans = identity.get("parallel", {}).get("plans", {})
    return {_read_shape(name): ParallelPlan(**degrees) for name, degrees in plans.items()}


def _read_shape(name: str) -> Shape:
    height, width, frames = map(int, name.split("x"))
    return height, width, frames
