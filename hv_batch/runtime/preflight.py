"""Checks a run and resolves its config before Ray is started: everything that needs no cluster."""

from __future__ import annotations

import logging
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from hv_batch import __version__
from hv_batch.job import layout
from hv_batch.job.config.engine_factory import build_engine
from hv_batch.job.config.hook_rules import identify_hooks
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.memory_check import check_memory
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.licences import TENCENT, engine_licence, run_licence
from hv_batch.job.log_records import add_process_fields, current_settings
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.column_report import describe_columns
from hv_batch.job.manifest.index import Index, load_index, load_recorded_index
from hv_batch.job.manifest.prompt_hook import apply_prompt_hook, describe_results
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.selection import Selection
from hv_batch.job.records.continuation import Continuation, equal_earlier, inspect_continuation
from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.records.run_document import RunState, check_revision, fingerprint, read_run
from hv_batch.job.records.run_identity import recorded_plans, recorded_poster, run_identity, with_recorded_poster
from hv_batch.job.redaction import public_url, public_values
from hv_batch.job.storage.hub_urls import refuse_hub_repository
from hv_batch.job.storage.store import Store
from hv_batch.job.workload import long_video_warning
from hv_batch.media.encoder_check import check_encoder
from hv_batch.protocol import Engine, ParallelPlan, UserError
from hv_batch.runtime.ray_contact import resolve_address
from hv_batch.runtime.run_context import RunContext, short_id
from hv_batch.sampling_params import Shape

logger = logging.getLogger(__name__)

# Packages whose versions are recorded, because the bytes of a video may depend on them.
RECORDED_PACKAGES = ("torch", "ray", "transformers", "imageio-ffmpeg", "pillow", "numpy")


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that has passed all checks."""

    context: RunContext
    index: Index
    pending: PendingSamples
    document: dict[str, Any]  # of run.json
    state: RunState
    continuation: Continuation | None = None  # if the run's identity differs from that of the root


def prepare_run(
    config: RunConfig,
    manifest: Manifest,
    store: Store,
    spool: Store,
    selection: Selection | None,
    address: str | None = None,
    *,
    resumed: bool = False,
    allow_change: Collection[str] = (),
) -> PreparedRun:
    """Check the engine, its weights, ffmpeg, the output root, the manifest and the GPU memory.

    Writes only the index of the manifest into `spool`, a temporary folder, and the probe of the output root.
    `allow_change` are the keys of the identity that may differ from those of the root (`hv_batch.job.records.
    continuation`).

    Raises UserError with all problems of the engine, ffmpeg, the output root and the manifest at once.
    """
    logger.info(_describe_reads(config, manifest))
    problems: list[str] = []
    with _collected(problems):
        resolve_address(address)
    with _collected(problems):
        engine = build_engine(config.model.engine, config.model.engine_options())
        _check_engine(engine, config)
    with _collected(problems):
        check_encoder(config.media)
    with _collected(problems):
        hooks = identify_hooks(config.hooks)
    with _collected(problems):
        unsafe_root = _probe(store)
    with _collected(problems):
        if not resumed:
            manifest.refuse_own_outputs(store.url, layout.examples())
        index = _read_manifest(config, manifest, store, spool, resumed)
        pending = PendingSamples(store, index, selection, keep_latents=config.output.keep_latents)
    if problems:
        raise UserError("\n".join(problems))
    if long := long_video_warning(index.summary.shapes):
        logger.warning(long)
    # Only now, because these checks require options that the engine has accepted.
    poster = _recorded_poster(store, config, allow_change)
    if poster is not None:
        config = config.model_copy(update={"media": config.media.model_copy(update={"poster": poster})})
    run = resolve_run(config, index.summary.shapes, _recorded_plans(store))
    groups = run.groups
    if len(groups.plans) > 1:
        sizes = ", ".join(f"{plan.world_size} for {len(groups.shapes(plan))} shape(s)" for plan in groups.plans)
        logger.info(f"groups of several sizes, in ranks: {sizes}")
    check_memory(run)
    _refuse([problem for plan in groups.plans for problem in engine.group_problems(plan, groups.shapes(plan))], config)
    versions = {"hv_batch": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in RECORDED_PACKAGES}
    identity = with_recorded_poster(run_identity(run), poster)
    identity |= {"model": engine.identity(), "manifest": index.summary.digest}
    if hooks:
        identity["hooks"] = hooks
    if index.summary.prompt_hook:  # a hook that answers otherwise would give other pixels
        hooks["prompt"]["results"] = index.summary.prompt_hook["sha256"]
    licence = _licence(store, engine)
    document = _document(identity, config, manifest, index, versions)
    document |= {} if licence == TENCENT else {"licence_id": licence}
    if unsafe_root:
        logger.warning(unsafe_root)
    state, continuation = inspect_continuation(
        store, document, index, config, allow_change, releases=pending.takes_back
    )
    if continuation:
        _refuse_other_licence(continuation, engine, licence)
    for note in continuation.notes if continuation else ():
        logger.info(note)
    if state is RunState.FINISHED and pending.takes_back:
        check_revision(store)
    written = continuation.run if continuation else {} if state is RunState.NEW else read_run(store)
    earlier = equal_earlier(written)
    context = RunContext(
        *(run, engine, store, fingerprint(identity), versions, licence, current_settings(), hooks), earlier=earlier
    )
    add_process_fields(run=short_id(context.fingerprint))
    return PreparedRun(context, index, pending, document, state, continuation)


def _describe_reads(config: RunConfig, manifest: Manifest) -> str:
    """What a run reads outside its output root, in one line: on a resume, run.json decides it."""
    options = public_values(config.model.options)
    paths = [f"model.options.{name} = {value}" for name, value in options.items() if "/" in str(value)]
    paths += [f"model.loras.{name} = {public_url(lora.path)}" for name, lora in config.model.loras.items()]
    urls = manifest.public_urls if isinstance(manifest.public_urls, str) else ", ".join(manifest.public_urls)
    return f"reads outside the output root: the manifest {urls}{''.join(f', {path}' for path in paths)}"


def _probe(store: Store) -> str | None:
    """Test that an unfinished output root can be written. Returns a warning about how, if there is one."""
    refuse_hub_repository(store.url)
    try:
        is_finished = store.exists(layout.SUCCESS)
    except OSError:
        is_finished = False  # the probe reports the reason better
    return None if is_finished else store.probe().warning


def _licence(store: Store, engine: Engine) -> str:
    """The licence that the run has recorded when it began, so that a resume cannot change it; else the engine's."""
    return run_licence(read_run(store)) if store.exists(layout.RUN) else engine_licence(engine)


def _refuse_other_licence(continuation: Continuation, engine: Engine, licence: str) -> None:
    """Raises UserError if a change of the weights that is allowed would give one dataset two licences."""
    has_other_weights = any(path.partition(".")[0] in ("model", "engine") for path in continuation.changed)
    if has_other_weights and (declared := engine_licence(engine)) != licence:
        raise UserError(
            f"The weights declare the licence {declared}, and the videos of this output root are under {licence}. A "
            "dataset has one licence: choose another output root for these weights."
        )


def _recorded_poster(store: Store, config: RunConfig, allow_change: Collection[str]) -> bool | None:
    """`media.poster` of a root in whose identity it is, unless the operator allows another value; None otherwise.

    The root keeps its value because the default of the key has changed since. Not even `--allow-change media` changes
    it, which is about other keys.
    """
    if "media.poster" in allow_change or not store.exists(layout.RUN):
        return None
    poster = recorded_poster(read_run(store)["identity"])
    if poster is not None and poster != config.media.poster:
        logger.info(
            f"media.poster is {str(poster).lower()}, as in {layout.RUN}; --allow-change media.poster changes it for "
            "the videos that follow"
        )
    return poster


def _recorded_plans(store: Store) -> Mapping[Shape, ParallelPlan]:
    return recorded_plans(read_run(store)["identity"]) if store.exists(layout.RUN) else {}


def _read_manifest(config: RunConfig, manifest: Manifest, store: Store, spool: Store, resumed: bool) -> Index:
    """The index in the output root if it is that of this manifest; otherwise, check and index the manifest.

    If the run is `resumed` from its root alone, a complete index is used without a look at the manifest.
    """
    if resumed:
        index = load_recorded_index(store, config, str(read_run(store)["manifest"].get("digest")))
        if index is None:
            logger.warning(
                f"the copy of the manifest in plan/ is missing or damaged, so the manifest {manifest.name} is read; if "
                "it has moved, give its location with --manifest"
            )
    else:
        index = load_index(store, manifest, config)
    if index:
        logger.info(f"manifest: {index.summary.samples} samples in {index.shards} shards, checked before")
        _log_columns(index)
        return index
    index = check_manifest(manifest, config, spool)
    if config.hooks.prompt:
        index = apply_prompt_hook(index, manifest, config, spool)
    summary = index.summary
    logger.info(f"manifest: {summary.rows} rows, {summary.samples} samples in {summary.shards} shards, all valid")
    _log_columns(index)
    if summary.prompt_hook:
        for line in describe_results(summary.prompt_hook):
            logger.info(line)
    return index


def _log_columns(index: Index) -> None:
    for line in describe_columns(index.summary.extra_kinds, index.summary.warnings):
        logger.info(line)


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def _check_engine(engine: Engine, config: RunConfig) -> None:
    plan = resolve_run(config).fixed_plan
    _refuse(engine.check() + (engine.group_problems(plan) if plan else []), config)


def _refuse(problems: list[str], config: RunConfig) -> None:
    """Raises UserError if there are problems."""
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"The engine {config.model.engine} cannot render with this config:\n{listing}")


def _document(
    identity: dict[str, Any], config: RunConfig, manifest: Manifest, index: Index, versions: dict[str, str]
) -> dict[str, Any]:
    summary = index.summary
    return {
        "identity": identity,
        "config": public_values(config.model_dump(mode="json")),
        "manifest": {
            "url": manifest.public_urls,
            "digest": summary.digest,
            "rows": summary.rows,
            "samples": summary.samples,
            "shards": summary.shards,
        },
        "versions": versions,
    }
