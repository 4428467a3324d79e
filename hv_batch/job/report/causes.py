"""Quarantined samples by cause: the failure class and the message without its numbers (`records.quarantine`)."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hv_batch.job.documents.report import MAX_CAUSES
from hv_batch.job.records.quarantine import MAX_EXAMPLES, OTHER_REASONS, UNREADABLE, normalize_message
from hv_batch.job.report.samples import MAX_ID_CHARS, clamp

MAX_TRACEBACK_CHARS = 8000
MAX_EXAMPLE_CHARS = 300

Cause = dict[str, Any]


def group_causes(records: Iterable[Mapping[str, Any]]) -> list[Cause]:
    """The causes of quarantine records, most samples first, with the first examples and the first traceback."""
    return add_causes([], map(_cause, records))


def add_causes(causes: Sequence[Mapping[str, Any]], more: Iterable[Mapping[str, Any]]) -> list[Cause]:
    """Both lists as one. At most MAX_CAUSES different causes; further ones are counted under OTHER_REASONS."""
    found = {(cause["class"], cause["message"]): dict(cause) for cause in causes}
    for cause in more:
        name = (cause["class"], cause["message"])
        if name not in found and len(found) >= MAX_CAUSES:
            name = ("OTHER", OTHER_REASONS)
        if name not in found:
            found[name] = {**cause, "class": name[0], "message": name[1]}
            continue
        known = found[name]
        examples = [*known["examples"], *cause["examples"]][:MAX_EXAMPLES]
        found[name] = {**known, "count": known["count"] + cause["count"], "examples": examples}
    return sorted(found.values(), key=lambda cause: -cause["count"])


def with_retry(causes: Iterable[Mapping[str, Any]], output: str) -> list[Cause]:
    """The causes with the command that releases the samples of their class; null if there is none."""
    return [{**cause, "retry": _retry(cause["class"], output)} for cause in causes]


def _cause(record: Mapping[str, Any]) -> Cause:
    example = {
        "id": clamp(record["id"], MAX_ID_CHARS),
        "key": record["key"],
        "shard": record["shard"],
        "prompt": clamp(record["params"].get("prompt", ""), MAX_EXAMPLE_CHARS),
    }
    traceback = record["traceback"]
    if len(traceback) > MAX_TRACEBACK_CHARS:  # its end names the error
        traceback = f"…{traceback[1 - MAX_TRACEBACK_CHARS :]}"
    return {
        "class": record["class"],
        "message": clamp(normalize_message(record["message"]), 1000),
        "count": 1,
        "examples": [example],
        "traceback": clamp(traceback, MAX_TRACEBACK_CHARS),
    }


def _retry(kind: str, output: str) -> str | None:
    if kind == UNREADABLE:
        return f"hv-batch verify {shlex.quote(output)}"
    if kind == "OTHER":
        return f"hv-batch retry {shlex.quote(output)}"
    return f"hv-batch retry {shlex.quote(output)} --class {kind}"
