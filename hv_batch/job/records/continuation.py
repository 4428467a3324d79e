"""An output root that continues with another identity: its manifest has grown, or the operator has allowed a change.

- **Growth.** The rows of before are the first rows of the manifest, unchanged. Positions decide shards, so old samples
  keep theirs. The last shard that was not full is sealed again, and all shards if the user's columns have changed.
- **An allowed change.** Committed samples keep their videos, pending ones are rendered with the new values.

Each record names the identity under which it was rendered. run.json lists the former identities in `earlier`.

`begin_run` changes a root in an order that the same command resumes from, wherever it is killed: `_SUCCESS`, so that no
root counts as finished with an open shard; then the card and the seals; then run.json; then the index. Only if it is
killed between the last two is the index older than run.json. No new row is rendered before both are there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.documents.reading import InvalidObjectError
from hv_batch.job.formatting import plural
from hv_batch.job.manifest.growth import growth_problem
from hv_batch.job.manifest.index import Index, load_recorded_index, read_index
from hv_batch.job.records.commits import find_shards
from hv_batch.job.records.identity_differences import changed_paths
from hv_batch.job.records.run_document import (
    RunState,
    describe_refusal,
    fingerprint,
    inspect_run,
    open_run,
    read_run,
)
from hv_batch.job.records.run_identity import (
    CHANGEABLE,
    OF_MANIFEST,
    check_changeable,
    is_below,
    is_changeable,
    is_same_but_manifest,
    parallel_plans,
)
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.records.unfinished_card import reopen_card
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads
from hv_batch.protocol import UserError

MAX_NAMED_KEYS = 6  # keys in a proposed command; if there are more, their sections are proposed
UNSEALERS = 16  # threads; a shard's seal takes five requests


@dataclass(frozen=True, slots=True)
class Continuation:
    """How an output root continues with another identity."""

    run: Mapping[str, Any]  # the run.json to write
    replaces: str  # the fingerprint of the run.json that it replaces
    changed: Sequence[str]  # the dotted paths that differ
    unsealed: Sequence[int]  # the shards to be sealed again
    notes: tuple[str, ...]  # what has changed, for the log


def inspect_continuation(
    store: Store,
    document: Mapping[str, Any],
    index: Index,
    config: RunConfig,
    allowed: Collection[str] = (),
    *,
    releases: bool = False,
) -> tuple[RunState, Continuation | None]:
    """The state of the root for the run that `document` describes, and how it continues if the identity differs.

    `index` is that of the manifest, `config` that of the run. `allowed` are the keys of `--allow-change`. `releases`
    says that quarantined samples will be released, so that a finished root is not finished. Writes nothing.

    Raises UserError if the root belongs to another run, and if the differences are neither growth nor allowed.
    """
    check_changeable(allowed)
    if not store.exists(layout.RUN):
        return inspect_run(store, document), None
    existing = read_run(store)
    ours, theirs = document["identity"], existing["identity"]
    if existing["fingerprint"] == fingerprint(ours) or theirs.get("revision", 1) != ours.get("revision", 1):
        return inspect_run(store, document), None
    changed = changed_paths(theirs, ours)
    before = _refuse_changes(store, existing, document, index, config, changed, allowed)
    grown = before is not None and index.summary.samples > before.summary.samples
    if store.exists(layout.SUCCESS) and not (grown or releases):
        return RunState.FINISHED, None  # no sample would be rendered with the new values
    chosen = [path for path in changed if not _follows(path, theirs, ours, has_grown=before is not None)]
    run = _next_run(existing, document, changed, keeps_config=not chosen)
    notes = tuple(_notes(before, index, chosen))
    unsealed = find_shards(store, _to_unseal(before, index, config), (layout.MEDIA, *layout.SEAL_FOLDERS))
    return RunState.RESUMED, Continuation(run, existing["fingerprint"], changed, unsealed, notes)


def begin_run(store: Store, document: Mapping[str, Any], index: Index, continuation: Continuation | None) -> None:
    """Write run.json and the index, or check that they are those of this run. The lease of the root must be held.

    Raises UserError as `inspect_run`, and if another process has changed run.json since `inspect_continuation`.
    """
    if continuation is None or read_run(store)["fingerprint"] == continuation.run["fingerprint"]:
        open_run(store, document)
    else:
        _continue(store, continuation)
    index.publish(store)


def _continue(store: Store, continuation: Continuation) -> None:
    if read_run(store)["fingerprint"] != continuation.replaces:
        raise UserError(
            f"Another process has changed {layout.RUN} of {public_url(store.url)} since this command has read it. Run "
            "the same command again."
        )
    for key in (layout.SUCCESS, layout.SUMMARY):
        if store.exists(key):
            store.delete(key)
    reopen_card(store)
    for _ in map_in_threads(partial(unseal_shard, store), continuation.unsealed, UNSEALERS):
        pass
    store.put(layout.RUN, encode(continuation.run))


def equal_earlier(run: Mapping[str, Any]) -> tuple[str, ...]:
    """The fingerprints of a run.json's former identities under which its samples have the same pixels and bytes.

    Latents and videos that were stored under them, but not committed, are those of this run.
    """
    return tuple(
        each["fingerprint"]
        for each in run.get("earlier", ())
        if is_same_but_manifest(each["identity"], run["identity"]) and each["fingerprint"] != run["fingerprint"]
    )


def _refuse_changes(
    store: Store,
    existing: Mapping[str, Any],
    document: Mapping[str, Any],
    index: Index,
    config: RunConfig,
    changed: Collection[str],
    allowed: Collection[str],
) -> Index | None:
    """Raise UserError unless each changed path is allowed or follows from growth. Returns the index of before if the
    manifest has changed.
    """
    before, problem = None, None
    if "manifest" in changed:
        before = _recorded_index(store, existing, config)
        problem = (
            growth_problem(before, index)
            if before
            else f"{layout.PLAN} holds no complete copy of the manifest of before, so the two cannot be compared"
        )
    theirs, ours = existing["identity"], document["identity"]
    refused = [
        path
        for path in changed
        if not (any(is_below(path, key) for key in allowed) and is_changeable(path))
        and not _follows(path, theirs, ours, has_grown=before is not None and problem is None)
    ]
    if refused:
        raise UserError(describe_refusal(store, existing, document, _reasons(refused, problem, allowed)))
    return before


def _reasons(refused: Collection[str], problem: str | None, allowed: Collection[str]) -> str:
    """Why these paths are refused, and the flags that allow them, as sentences that each end with a space."""
    reasons = f"The manifest has not only grown: {problem}. " if problem else ""
    never = [path for path in refused if not is_changeable(path) and not (problem and path in OF_MANIFEST)]
    if never:
        reasons += (
            f"Within an output root only {', '.join(CHANGEABLE)} can change (if --allow-change names them), not "
            f"{', '.join(never[:MAX_NAMED_KEYS])}. "
        )
    elif not problem:
        keys = refused if len(refused) <= MAX_NAMED_KEYS else sorted({path.partition(".")[0] for path in refused})
        flags = " ".join(f"--allow-change {key}" for key in (*allowed, *keys))
        reasons += (
            f"To continue with your values, add {flags}: committed samples keep their videos, and each record names "
            "the values with which it was rendered. "
        )
    return reasons


def _recorded_index(store: Store, run: Mapping[str, Any], config: RunConfig) -> Index | None:
    """The index in the root; None if it is not complete.

    It is that of an earlier manifest if a growing run was killed before it had written its own. No sample of the rows
    that this manifest added has been rendered then.
    """
    try:
        digest = read_index(store).document["summary"]["digest"]
    except (FileNotFoundError, InvalidObjectError):
        return None
    known = {each["identity"].get("manifest") for each in (run, *run.get("earlier", ()))}
    return load_recorded_index(store, config, digest) if digest in known else None


def _follows(path: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], *, has_grown: bool) -> bool:
    """Whether a change needs no permission: that of a manifest that has grown, and the plan of a shape that only one of
    the two runs has. Neither changes a pixel of a sample that both have.
    """
    if path in OF_MANIFEST:
        return has_grown
    shapes = parallel_plans(ours).keys() ^ parallel_plans(theirs).keys()
    return any(is_below(path, f"parallel.plans.{shape}") for shape in shapes)


def _to_unseal(before: Index | None, index: Index, config: RunConfig) -> Sequence[int]:
    """The shards whose tables change: the last one if it was not full, or all if the user's columns differ."""
    if before is None:
        return ()
    if before.summary.extra_kinds != index.summary.extra_kinds:
        return range(before.shards)
    full, rest = divmod(before.summary.samples, config.output.shard_size)
    return [full] if rest and index.summary.samples > before.summary.samples else ()


def _next_run(
    existing: Mapping[str, Any], document: Mapping[str, Any], changed: Sequence[str], *, keeps_config: bool
) -> dict[str, Any]:
    earlier = {name: existing[name] for name in ("identity", "fingerprint", "manifest")}
    earlier |= {"replaced_at": datetime.now(UTC).isoformat(timespec="seconds"), "changed": list(changed)}
    new = {name: document[name] for name in ("identity", "manifest")}
    if not keeps_config:
        new |= {name: document[name] for name in ("config", "versions")}
    return {
        **existing,
        **new,
        "fingerprint": fingerprint(document["identity"]),
        "earlier": [*existing.get("earlier", ()), earlier],
    }


def _notes(before: Index | None, index: Index, allowed: Collection[str]) -> Iterator[str]:
    if before is not None:
        yield f"the manifest has grown from {before.summary.rows:,} to {plural(index.summary.rows, 'row')}"
        if before.summary.extra_kinds != index.summary.extra_kinds:
            yield "its further columns differ from before, so all sealed shards are sealed again"
    if allowed:
        yield (
            f"continuing with other values of {', '.join(allowed)}, as --allow-change allows: committed samples keep "
            "their videos"
        )
