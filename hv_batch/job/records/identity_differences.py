"""The differences between the identities of two runs, as dotted paths or as lines for a message."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from hv_batch.job.storage.canonical_json import encode

MAX_VALUE_CHARS = 80  # of each side of a difference: a prompt can be a page long

ABSENT = object()


def find_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """One line for each difference between the identities of two runs, given as `run.json` documents."""
    lines = list(differences(theirs["identity"], json.loads(encode(ours["identity"]))))
    if any(line.startswith("manifest:") for line in lines):
        # Two digests explain nothing, so the descriptions of the manifests are compared as well.
        lines += [f"(manifest) {line}" for line in differences(theirs.get("manifest"), ours.get("manifest"))]
    return lines


def changed_paths(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """The dotted paths at which two identities differ, in order."""
    return [path for path, _, _ in _different_leaves(theirs, json.loads(encode(ours)))]


def differences(theirs: Any, ours: Any, path: str = "") -> Iterator[str]:
    """One line for each leaf at which two JSON values differ, in order of their dotted paths."""
    for where, left, right in _different_leaves(theirs, ours, path):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
        yield f"{where}: {_clip(left, same)} -> {_clip(right, same)}"


def _different_leaves(theirs: Any, ours: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """The dotted path and both texts of each leaf at which two JSON values differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted(theirs.keys() | ours.keys()):
            where = f"{path}.{name}" if path else name
            yield from _different_leaves(theirs.get(name, ABSENT), ours.get(name, ABSENT), where)
    elif (left := _as_text(theirs)) != (right := _as_text(ours)):
        yield path, left, right


def _as_text(value: Any) -> str:
    return "(absent)" if value is ABSENT else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _clip(text: str, same: int) -> str:
    """At most MAX_VALUE_CHARS of `text`, around its first differing character, which is at index `same`."""
    if len(text) <= MAX_VALUE_CHARS:
        return text
    start = max(0, min(same - MAX_VALUE_CHARS // 2, len(text) - MAX_VALUE_CHARS))
    end = start + MAX_VALUE_CHARS
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
