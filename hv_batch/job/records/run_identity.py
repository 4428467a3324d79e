"""The identity of a run: every part of its config that changes pixels or keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.workload import shape_name
from hv_batch.protocol import ParallelPlan, Shape

# The number of the pixels and bytes that one config and one manifest give. It is raised by a change of either, so that
# no run continues with other pixels under an equal identity. Revision 1 is not written into the identity.
REVISION = 2

# The last version of hv_batch that renders each older revision.
LAST_VERSIONS = {1: "0.1.0"}


def run_identity(run: ResolvedRun) -> dict[str, Any]:
    """The part of a config that changes pixels or keys, as JSON values, without the engine's own `identity()` (P3).

    With `gpus_per_group: auto`, the plans of the manifest's shapes are part of the identity.
    """
    config = run.config
    return {
        "revision": REVISION,
        "seed": config.seed,
        "engine": config.model.engine,
        "defaults": config.defaults.model_dump(mode="json"),
        "parallel": parallel_identity(run),
        "media": config.media.model_dump(mode="json"),
        "shard_size": config.output.shard_size,
        "webdataset": config.output.webdataset,
    } | ({"manifest_options": options} if (options := config.manifest.identity()) else {})


def without_revision(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity except for its revision: what the user has chosen."""
    return {name: value for name, value in identity.items() if name != "revision"}


def revision_problem(identity: Mapping[str, Any]) -> str | None:
    """Why this version cannot continue a run with this identity: one sentence, or None if it can."""
    revision = identity.get("revision", 1)
    if revision == REVISION:
        return None
    if last := LAST_VERSIONS.get(revision):
        return (
            f"is of revision {revision}, and this version of hv_batch renders revision {REVISION}, which has other "
            f"pixels or other bytes, so finish it with hv_batch {last}, the last version that can, or choose another "
            "output root"
        )
    return (
        f"is of revision {revision}, which this version of hv_batch does not know (it renders revision {REVISION}), so "
        "continue it with the version that run.json names, or choose another output root"
    )


def parallel_identity(run: ResolvedRun) -> dict[str, Any]:
    """The resolved parallel plan, or that of each shape.

    It is resolved, so that neither a new default nor a new cost model can change an existing run.
    """
    device = {"device": run.config.parallel.device}
    if plan := run.fixed_plan:
        degrees = asdict(plan)
        if plan.cfg_degree == 1:  # a later key; without it, the identity of older output roots stays the same
            del degrees["cfg_degree"]
        return device | degrees
    return device | {"plans": {shape_name(shape): asdict(plan) for shape, plan in run.groups.by_shape.items()}}


def recorded_plans(identity: Mapping[str, Any]) -> dict[Shape, ParallelPlan]:
    """The plan of each shape in a run's identity, from `parallel_identity`; empty if all shapes share one plan."""
    plans = identity.get("parallel", {}).get("plans", {})
    return {_read_shape(name): ParallelPlan(**degrees) for name, degrees in plans.items()}


def _read_shape(name: str) -> Shape:
    height, width, frames = map(int, name.split("x"))
    return height, width, frames
