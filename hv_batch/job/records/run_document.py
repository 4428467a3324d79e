"""What an output root is: one manifest and one resolved config, written down before anything else (P2).

`run.json` is put if absent, so the first command decides what the root is for. Every later command must bring the same
identity, or is refused with the difference. What is not part of the identity (how many groups, retries, ...) may change
from one command to the next.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

from pydantic import ValidationError

from hv_batch.job import layout
from hv_batch.job.config.retired_keys import replace_retired
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.records.commits import LICENCE_ID
from hv_batch.job.redaction import MASK, public_url
from hv_batch.job.storage.canonical_json import decode, encode
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

RUN_SCHEMA = "hv_batch/run/1"

# More lines than this are another run altogether, and the first ones say so.
MAX_DIFFERENCES = 20
# A prompt can be a page long; this much of each side shows which one it is.
MAX_VALUE_CHARS = 80

_ABSENT = object()


class RunState(enum.Enum):
    NEW = "new"
    RESUMED = "resumed"
    FINISHED = "finished"


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hex digest of everything that changes pixels (P3); the order of the keys does not matter."""
    return hashlib.sha256(encode(identity)).hexdigest()


def inspect_run(store: Store, document: Mapping[str, Any]) -> RunState:
    """What the output root is to the run that `document` describes, without writing anything.

    Raises UserError when the root belongs to another run, with every dotted path whose value differs.
    """
    if not store.exists(layout.RUN):
        _refuse_orphans(store)
        return RunState.NEW
    existing = read_run(store)
    if existing["fingerprint"] != fingerprint(document["identity"]):
        raise UserError(_refusal(store, existing, document))
    return RunState.FINISHED if store.exists(layout.SUCCESS) else RunState.RESUMED


def open_run(store: Store, document: Mapping[str, Any]) -> RunState:
    """Claim the output root for the run that `document` describes, or find out that it is this run's already.

    `document["identity"]` must be JSON-able; all else of it is written as it is. Raises UserError as `inspect_run`.
    """
    state = inspect_run(store, document)
    written = {
        "schema": RUN_SCHEMA,
        "fingerprint": fingerprint(document["identity"]),
        "licence": licence_notice(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **document,
    }
    if state is RunState.NEW and not store.put_new(layout.RUN, encode(written)):
        return inspect_run(store, document)  # another driver was faster
    return state


def read_run(store: Store) -> dict[str, Any]:
    """The `run.json` of an output root. Raises UserError when there is none, or it is not one of ours."""
    try:
        run = decode(store.get(layout.RUN))
        is_ours = run["schema"] == RUN_SCHEMA and {"identity", "fingerprint", "config", "manifest"} <= run.keys()
    except FileNotFoundError:
        raise UserError(
            f"{public_url(store.url)} is not an output root: it has no {layout.RUN}. Check the path; a run writes this "
            "file before anything else."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise UserError(
            f"{layout.RUN} in {public_url(store.url)} was not written by this program, or not by this version (it "
            f'must say "schema": "{RUN_SCHEMA}"). Choose another output root.'
        )
    return run


def finish_run(store: Store, summary: Mapping[str, Any]) -> None:
    """Write the summary, and seal the run when no sample is pending and every shard is sealed.

    The seal is last: a root that has it needs nothing more.
    """
    store.put(layout.SUMMARY, encode(summary))
    if summary["pending"] == 0 and summary["shards_sealed"] == summary["shards"]:
        store.put(layout.SUCCESS, b"")


def licence_notice() -> str:
    """What users of the outputs have to know (spec section 10), as one paragraph for `run.json`, report and README."""
    return (
        "The HunyuanVideo weights, and the videos made with them, come under the Tencent Hunyuan Community License "
        f"Agreement (here: {LICENCE_ID}). It does not cover the European Union, the United Kingdom and South Korea, "
        "and so grants nothing there. The videos must not be used to improve any AI model other than Hunyuan and its "
        "derivatives. Read the licence that came with the weights before you use or pass on this dataset."
    )


def _refuse_orphans(store: Store) -> None:
    """Commit records without a run.json could be of any config, and resuming would take them for ours."""
    has_commits = next(store.list(layout.COMMITS), None) is not None
    # A run that began since the first look has its run.json by now.
    if has_commits and not store.exists(layout.RUN):
        raise UserError(
            f"{public_url(store.url)} holds commit records but no {layout.RUN}, so nobody can tell which config and "
            f"manifest they were rendered from. Put its {layout.RUN} back, or choose another output root."
        )


def _refusal(store: Store, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    lines = find_differences(theirs, ours)
    shown = "\n".join(f"  {line}" for line in lines[:MAX_DIFFERENCES])
    rest = f"\n  and {len(lines) - MAX_DIFFERENCES} more" if len(lines) > MAX_DIFFERENCES else ""
    return (
        f"The output root {public_url(store.url)} was made by a run with another config, manifest or model, so it "
        f"cannot be resumed with these. What differs (theirs -> yours):\n{shown}{rest}\n"
        "Choose another output root, or go back to the values on the left."
    )


def find_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Readable lines for all that differs between the identities of two runs (`run.json` or what it will be)."""
    lines = list(_differences(theirs["identity"], json.loads(encode(ours["identity"]))))
    if any(line.startswith("manifest:") for line in lines):
        # Two digests differ, but say nothing: what the manifests are does.
        lines += [f"(manifest) {line}" for line in _differences(theirs.get("manifest"), ours.get("manifest"))]
    return lines


def _differences(theirs: Any, ours: Any, path: str = "") -> Iterator[str]:
    """Readable lines for every leaf at which two JSON values differ, in order of their dotted paths."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted(theirs.keys() | ours.keys()):
            where = f"{path}.{name}" if path else name
            yield from _differences(theirs.get(name, _ABSENT), ours.get(name, _ABSENT), where)
    elif (left := _as_text(theirs)) != (right := _as_text(ours)):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
        yield f"{path}: {_clip(left, same)} -> {_clip(right, same)}"


def _as_text(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _clip(text: str, same: int) -> str:
    """At most MAX_VALUE_CHARS of `text`, around its first character that differs, which is at `same`."""
    if len(text) <= MAX_VALUE_CHARS:
        return text
    start = max(0, min(same - MAX_VALUE_CHARS // 2, len(text) - MAX_VALUE_CHARS))
    end = start + MAX_VALUE_CHARS
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")


def chosen_shards(run: Mapping[str, Any], shards: Collection[int] | None) -> Sequence[int]:
    """`shards` in order, or all of the run. Raises UserError for one that the run does not have."""
    count = plan_size(run)[1]
    if shards is None:
        return range(count)
    if missing := sorted(shard for shard in shards if shard >= count):
        raise UserError(f"The run has {count:,} shards, numbered from 0; there is no shard {missing[0]}.")
    return sorted(shards)


def plan_size(run: Mapping[str, Any]) -> tuple[int, int]:
    """(samples, shards) of a run; every shard is full but the last."""
    samples: int = run["manifest"]["samples"]
    return samples, -(-samples // run["config"]["output"]["shard_size"])


def read_run_config(output: str) -> tuple[RunConfig, str | list[str]]:
    """The config and the manifest's URLs that the run at `output` was begun with. Raises UserError when
    there is no run, or its run.json does not hold everything.
    """
    run = read_run(Store(output))
    config = run["config"]
    if isinstance(config, dict):
        config = replace_retired(config)
    if _is_masked(config):
        raise UserError(
            f"The run at {output} was begun with a secret in its config, which is not kept in its run.json. Give the "
            "secret by the environment, or resume with the command that began the run."
        )
    try:
        return RunConfig.model_validate(config), run["manifest"]["url"]
    except ValidationError as error:
        raise UserError(
            f"The config in the run.json of {output} is not one of this version of hv_batch: {error}. Resume with the "
            "version that is named there."
        ) from error


def _is_masked(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_is_masked, value.values()))
    return any(map(_is_masked, value)) if isinstance(value, list) else value == MASK
