"""`run.json`: the manifest and the resolved config of an output root, written before anything else (P2).

`run.json` is put if absent, so the first command determines the run of the root. Every later command must have the same
identity, or it is refused with a list of the differences. Values outside the identity (number of groups, retries, ...)
may change from one command to the next. `continuation` holds the two changes with which a root may continue; run.json
then lists the former identities in `earlier`.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from hv_batch.job import layout
from hv_batch.job.config.engine_factory import refuse_unknown_engine
from hv_batch.job.config.hook_rules import refuse_unnamed_hooks
from hv_batch.job.config.retired_keys import replace_retired
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.documents.card import SCHEMA as CARD_SCHEMA
from hv_batch.job.documents.reading import InvalidObjectError, read
from hv_batch.job.documents.schema import RunDocument, SummaryDocument
from hv_batch.job.licences import licence_notice, run_licence
from hv_batch.job.records.identity_differences import ABSENT, differences, find_differences
from hv_batch.job.records.run_identity import POSTER, recorded_poster, revision_problem, without_revision
from hv_batch.job.records.unfinished_card import announce_run
from hv_batch.job.redaction import MASK, public_url
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

RUN_SCHEMA = "hv_batch/run/1"
DATASET_SCHEMA = "hv_batch/dataset/2"  # of the tables of a root that begins now; absent in run.json: DATASET_SCHEMA_1
DATASET_SCHEMA_1 = "hv_batch/dataset/1"

MAX_DIFFERENCES = 20  # lines in a message: enough to recognise that a root belongs to an entirely different run


class RunState(enum.Enum):
    NEW = "new"
    RESUMED = "resumed"
    FINISHED = "finished"


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hex digest of everything that changes pixels (P3). It does not depend on the order of the keys."""
    return hashlib.sha256(encode(identity)).hexdigest()


def inspect_run(store: Store, document: Mapping[str, Any]) -> RunState:
    """The state of the run that `document` describes in this output root. Writes nothing.

    Raises UserError if the root belongs to another run, with every dotted path whose value differs, or if it is not
    finished and of another revision.
    """
    if not store.exists(layout.RUN):
        _refuse_orphans(store)
        return RunState.NEW
    existing = read_run(store)
    ours, is_finished = document["identity"], store.exists(layout.SUCCESS)
    if existing["fingerprint"] != fingerprint(ours):
        if not is_finished and existing["identity"].get("revision", 1) != ours.get("revision", 1):
            _check_revision(store, existing)
        if fingerprint(without_revision(existing["identity"])) != fingerprint(without_revision(ours)):
            raise UserError(describe_refusal(store, existing, document))
    return RunState.FINISHED if is_finished else RunState.RESUMED


def check_revision(store: Store) -> None:
    """Raises UserError if this version cannot render samples of the run again, because the run is of another revision.

    To be called before anything is removed from a root so that it is rendered again.
    """
    _check_revision(store, read_run(store))


def _check_revision(store: Store, run: Mapping[str, Any]) -> None:
    if problem := revision_problem(run["identity"]):
        raise UserError(f"The run in the output root {public_url(store.url)} {problem}.")


def open_run(store: Store, document: Mapping[str, Any]) -> RunState:
    """Write `run.json` for the run that `document` describes, or check that the root already belongs to this run.

    `document` must consist of JSON values and is written as it is. Raises UserError as `inspect_run`.
    """
    state = inspect_run(store, document)
    written = {
        "schema": RUN_SCHEMA,
        "fingerprint": fingerprint(document["identity"]),
        "dataset": DATASET_SCHEMA,  # fixed here, so that all tables of a root have one schema
        "licence": licence_notice(run_licence(document)),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": CARD_SCHEMA,
        **document,
    }
    if state is RunState.NEW and not store.put_new(layout.RUN, encode(written)):
        return inspect_run(store, document)  # another driver has written it meanwhile
    if state is not RunState.FINISHED:
        announce_run(store)
    return state


def read_run(store: Store) -> dict[str, Any]:
    """The `run.json` of an output root, which does not contradict itself.

    Raises UserError if there is none, if it is not of this program and version, or if its identity, fingerprint and
    config do not agree.
    """
    try:
        run = read(store, layout.RUN, RunDocument)
    except FileNotFoundError:
        raise UserError(
            f"{public_url(store.url)} is not an output root: it has no {layout.RUN}. Check the path; a run writes this "
            "file before anything else."
        ) from None
    except InvalidObjectError as error:
        if not error.is_readable:
            raise UserError(f"The output root {public_url(store.url)} cannot be read: {error.__cause__}.") from error
        raise UserError(
            f"{layout.RUN} in {public_url(store.url)} is damaged, or was not written by this version of hv_batch: "
            f"{error.problem}. Restore it from a copy, choose another output root, or use the version that wrote it."
        ) from error
    if problems := contradictions(run):
        raise UserError(
            f"{layout.RUN} in {public_url(store.url)} was changed after it was written: {'; '.join(problems)}. Nothing "
            "is removed or rendered, because the records cannot be compared with it. Restore it from a copy."
        )
    return run


def contradictions(run: Mapping[str, Any]) -> list[str]:
    """What does not agree in a run.json: the fingerprint with the identity, and the identity with the config."""
    identity, config = run["identity"], run["config"]
    problems = [
        f"its fingerprint is {each['fingerprint']}, and that of its identity is {expected}"
        for each in (run, *run.get("earlier", ()))
        if each["fingerprint"] != (expected := fingerprint(each["identity"]))
    ]
    for path, recorded in _recorded_twice(identity):
        value = _value_at(config, path)
        if path == "media" and isinstance(value, dict) and recorded_poster(identity) is None:
            value = {name: each for name, each in value.items() if name != POSTER}
        problems += [f"config.{line} (identity)" for line in differences(value, recorded, path) if value is not ABSENT][
            :MAX_DIFFERENCES
        ]
    return [problem for problem in problems if f'"{MASK}" ->' not in problem]


def _recorded_twice(identity: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values of the config that an identity repeats, by their dotted path in the config."""
    paths = {"seed": "seed", "engine": "model.engine", "defaults": "defaults", "media": "media"}
    paths |= {"shard_size": "output.shard_size", "webdataset": "output.webdataset"}
    yield from ((path, identity[name]) for name, path in paths.items() if name in identity)
    yield "parallel.device", identity["parallel"]["device"]
    yield from ((f"manifest.{name}", value) for name, value in identity.get("manifest_options", {}).items())


def _value_at(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values.get(name, ABSENT) if isinstance(values, dict) else ABSENT
    return values


def dataset_schema(run: Mapping[str, Any]) -> str:
    """The schema of the tables of a run, from its run.json."""
    schema: str = run.get("dataset", DATASET_SCHEMA_1)
    return schema


def finish_run(store: Store, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, and `_SUCCESS` if no sample is pending and every shard is sealed.

    `_SUCCESS` must be written last: a root that has it is complete.
    """
    store.put(layout.SUMMARY, encode(summary))
    if summary["pending"] == 0 and summary["shards_sealed"] == summary["shards"]:
        store.put(layout.SUCCESS, b"")


def read_summary(store: Store) -> dict[str, Any] | None:
    """The `summary.json` of an output root; None if there is none, or if it is damaged or that of another run."""
    try:
        summary = read(store, layout.SUMMARY, SummaryDocument)
    except (FileNotFoundError, InvalidObjectError):
        return None
    return summary if summary["fingerprint"] == read_run(store)["fingerprint"] else None


def _refuse_orphans(store: Store) -> None:
    """Raise UserError if there are commit records but no run.json: their config is unknown, so a resume is unsafe."""
    has_commits = next(store.list(layout.COMMITS), None) is not None
    # A run that started after the first check has written its run.json before its first commit record.
    if has_commits and not store.exists(layout.RUN):
        raise UserError(
            f"{public_url(store.url)} holds commit records but no {layout.RUN}, so the config and the manifest of the "
            f"records are unknown. Restore {layout.RUN}, or choose another output root."
        )


def describe_refusal(store: Store, theirs: Mapping[str, Any], ours: Mapping[str, Any], why: str = "") -> str:
    """The message for a command with another identity than the root's. `why` explains it before the remedy."""
    lines = find_differences(theirs, ours)
    shown = "\n".join(f"  {line}" for line in lines[:MAX_DIFFERENCES])
    rest = f"\n  and {len(lines) - MAX_DIFFERENCES} more" if len(lines) > MAX_DIFFERENCES else ""
    return (
        f"The output root {public_url(store.url)} was made by a run with another config, manifest or model, so it "
        f"cannot be resumed with these. What differs (theirs -> yours):\n{shown}{rest}\n"
        f"{why}Choose another output root, or go back to the values on the left."
    )


def chosen_shards(run: Mapping[str, Any], shards: Collection[int] | None) -> Sequence[int]:
    """`shards` in order, or all shards of the run if None. Raises UserError if the run does not have one of them."""
    count = plan_size(run)[1]
    if shards is None:
        return range(count)
    if missing := sorted(shard for shard in shards if shard >= count):
        raise UserError(f"There is no shard {missing[0]}: the run has {count:,} shards, numbered from 0.")
    return sorted(shards)


def shard_samples(run: Mapping[str, Any], shard: int) -> int:
    """The number of samples of a shard of a run."""
    size: int = run["config"]["output"]["shard_size"]
    return min(size, int(run["manifest"]["samples"]) - shard * size)


def plan_size(run: Mapping[str, Any]) -> tuple[int, int]:
    """(samples, shards) of a run. Every shard except the last is full."""
    samples: int = run["manifest"]["samples"]
    return samples, -(-samples // run["config"]["output"]["shard_size"])


def read_run_config(
    output: str, engines: Collection[str] = (), hooks: Collection[str] = ()
) -> tuple[RunConfig, str | list[str]]:
    """The config and the manifest URLs with which the run at `output` was started.

    An output root says what to read, but neither what to execute nor where to write outside of it. So its engine must
    be a known one or among `engines`, which the operator names, its hooks must be among `hooks`, and its
    `output.spool_folder` is not used.

    Raises UserError if there is no run, if its run.json does not hold the complete config, for an unknown engine, or
    for a hook that is not named.
    """
    run = read_run(Store(output))
    config = run["config"]
    if isinstance(config, dict):
        config = replace_retired(config)
    if _is_masked(config):
        raise UserError(
            f"The config of the run at {output} contained a secret, which run.json does not store. Set the secret in "
            "the environment, or resume with the command that started the run."
        )
    try:
        resumed = RunConfig.model_validate(config)
    except ValidationError as error:
        raise UserError(
            f"The config in the run.json of {output} is not valid for this version of hv_batch: {error}. Resume with "
            "the version that run.json names."
        ) from error
    refuse_unknown_engine(resumed.model.engine, public_url(output), engines)
    refuse_unnamed_hooks(resumed.hooks, public_url(output), hooks, engines)
    local = resumed.output.model_copy(update={"spool_folder": None})
    return resumed.model_copy(update={"output": local}), run["manifest"]["url"]


def recorded_spool_folder(run: Mapping[str, Any]) -> str | None:
    """The `output.spool_folder` with which a run was started, from its run.json. It may be read, but not created or
    written to.
    """
    folder = run["config"]["output"].get("spool_folder")
    return folder if isinstance(folder, str) else None


def _is_masked(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_is_masked, value.values()))
    return any(map(_is_masked, value)) if isinstance(value, list) else value == MASK
