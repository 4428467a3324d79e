"""The identity of a run: every part of its config that changes pixels or keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.workload import shape_name
from hv_batch.protocol import ParallelPlan, UserError
from hv_batch.sampling_params import Shape

# The number of the pixels and bytes that one config and one manifest give. It is raised by a change of either, so that
# no run continues with other pixels under an equal identity. Revision 1 is not written into the identity.
REVISION = 2

# The last version of hv_batch that renders each older revision.
LAST_VERSIONS = {1: "0.1.0"}

# The parts of an identity that the operator may allow to change within an output root, because each record names the
# identity under which it was rendered. Everything else decides which samples there are, where they lie, and how their
# tables look: seeds, shards, `defaults.num_videos`.
CHANGEABLE = ("defaults", "engine", "media", "model", "parallel")
POSTER = "poster"  # the key of `media` that is not part of an identity
FIXED_DEFAULT = "defaults.num_videos"

# What differs if a manifest has grown: its digest, and that of what a prompt hook has made of its rows.
OF_MANIFEST = ("manifest", "hooks.prompt.results")


def run_identity(run: ResolvedRun) -> dict[str, Any]:
    """The part of a config that changes pixels or keys, as JSON values, without the engine's own `identity()` (P3).

    With `gpus_per_group: auto`, the plans of the manifest's shapes are part of the identity. A poster changes neither
    pixels nor keys, so `media.poster` is not; see `with_recorded_poster`.
    """
    config = run.config
    return {
        "revision": REVISION,
        "seed": config.seed,
        "engine": config.model.engine,
        "defaults": config.defaults.model_dump(mode="json"),
        "parallel": parallel_identity(run),
        "media": config.media.model_dump(mode="json", exclude={POSTER}),
        "shard_size": config.output.shard_size,
        "webdataset": config.output.webdataset,
    } | ({"manifest_options": options} if (options := config.manifest.identity()) else {})


def recorded_poster(identity: Mapping[str, Any]) -> bool | None:
    """`media.poster` in the identity of a root, where those of version 0.1 have it and where it decides; else None."""
    poster = identity.get("media", {}).get(POSTER)
    return poster if isinstance(poster, bool) else None


def with_recorded_poster(identity: Mapping[str, Any], poster: bool | None) -> dict[str, Any]:
    """The identity from `run_identity` as it is in a root with this `recorded_poster`."""
    return {**identity} if poster is None else {**identity, "media": {**identity["media"], POSTER: poster}}


def without_revision(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity except for its revision: what the user has chosen."""
    return {name: value for name, value in identity.items() if name != "revision"}


def is_changeable(path: str) -> bool:
    """Whether the value at this dotted path may change within an output root if the operator allows it."""
    return any(is_below(path, key) for key in CHANGEABLE) and path != FIXED_DEFAULT


def is_below(path: str, key: str) -> bool:
    """Whether a dotted path is `key` or lies below it."""
    return path == key or path.startswith(f"{key}.")


def check_changeable(keys: Collection[str]) -> None:
    """Raises UserError if one of the keys of `--allow-change` can never change within an output root."""
    for key in keys:
        if not is_changeable(key):
            raise UserError(
                f"--allow-change {key}: this cannot change within an output root; allowed: {', '.join(CHANGEABLE)}, or "
                f"a dotted path below one of them, except {FIXED_DEFAULT}. Everything else decides which samples a run "
                "has and where they lie. Choose another output root for the change."
            )


def is_same_but_manifest(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether a sample that is in both manifests has the same pixels and bytes under these two identities.

    With `gpus_per_group: auto`, a manifest that grows may add the plans of further shapes.
    """
    theirs, ours = _without_manifest(theirs), _without_manifest(ours)
    plans = parallel_plans(ours)
    if any(plans.get(shape) != plan for shape, plan in parallel_plans(theirs).items()):
        return False
    return _without_plans(theirs) == _without_plans(ours)


def _without_manifest(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity without OF_MANIFEST."""
    rest = {name: value for name, value in identity.items() if name != "manifest"}
    hooks = rest.get("hooks")
    if isinstance(hooks, dict) and isinstance(prompt := hooks.get("prompt"), dict):
        rest["hooks"] = {**hooks, "prompt": {name: value for name, value in prompt.items() if name != "results"}}
    return rest


def _without_plans(identity: Mapping[str, Any]) -> dict[str, Any]:
    parallel = {name: value for name, value in identity["parallel"].items() if name != "plans"}
    return {**identity, "parallel": parallel}


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
    return {_read_shape(name): ParallelPlan(**degrees) for name, degrees in parallel_plans(identity).items()}


def parallel_plans(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """As `recorded_plans`, with the names of the shapes, and the degrees as they are recorded."""
    plans: Mapping[str, Any] = identity.get("parallel", {}).get("plans", {})
    return plans


def _read_shape(name: str) -> Shape:
    height, width, frames = map(int, name.split("x"))
    return height, width, frames
