"""The columns that a user's own manifest fields become in a dataset.

Shards seal hours apart and know nothing of each other, yet a dataset loader wants one schema in all of them. So a
column's kind is a *join* over every value in the manifest: it does not depend on order, a pass over the manifest can
compute it in constant memory (`merge_types`), and what no common type holds becomes JSON text instead of being bent into one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import pyarrow as pa

EXACT_FLOAT_INT = 2**53  # beyond it a float64 no longer holds every whole number
INT64 = 2**63

# The names that dataset loaders (Hugging Face VideoFolder) give to the media itself.
MEDIA_COLUMNS = frozenset({"video", "videos", "image", "images"})


class ColumnType(StrEnum):
    """What all values of one column have in common."""

    NULL = "null"  # no value seen
    BOOL = "bool"
    INT = "int"  # whole numbers that a float64 holds exactly
    LONG = "long"  # whole numbers that need all of int64
    FLOAT = "float"
    TEXT = "text"
    JSON = "json"  # lists, objects, larger numbers, and every mixture without a common type


ARROW_TYPES: Mapping[ColumnType, pa.DataType] = {
    ColumnType.NULL: pa.string(),
    ColumnType.BOOL: pa.bool_(),
    ColumnType.INT: pa.int64(),
    ColumnType.LONG: pa.int64(),
    ColumnType.FLOAT: pa.float64(),
    ColumnType.TEXT: pa.string(),
    ColumnType.JSON: pa.string(),
}

_WIDER = {
    frozenset({ColumnType.INT, ColumnType.LONG}): ColumnType.LONG,
    frozenset({ColumnType.INT, ColumnType.FLOAT}): ColumnType.FLOAT,
}


def column_type(value: Any) -> ColumnType:
    """Kind of one JSON value."""
    match value:
        case None:
            return ColumnType.NULL
        case bool():
            return ColumnType.BOOL
        case int():
            if -EXACT_FLOAT_INT <= value <= EXACT_FLOAT_INT:
                return ColumnType.INT
            return ColumnType.LONG if -INT64 <= value < INT64 else ColumnType.JSON
        case float():
            return ColumnType.FLOAT
        case str():
            return ColumnType.TEXT
    return ColumnType.JSON


def common_type(one: ColumnType, other: ColumnType) -> ColumnType:
    """The narrowest kind that holds the values of both: commutative, associative, idempotent."""
    if one == other or other == ColumnType.NULL:
        return one
    if one == ColumnType.NULL:
        return other
    return _WIDER.get(frozenset({one, other}), ColumnType.JSON)


def merge_types(kinds: dict[str, ColumnType], extra: Mapping[str, Any]) -> None:
    """Widen `kinds` in place by the extra columns of one manifest row."""
    for name, value in extra.items():
        kinds[name] = common_type(kinds.get(name, ColumnType.NULL), column_type(value))


def arrow_column(values: Iterable[Any], kind: ColumnType) -> pa.Array:
    """Values of a column as Arrow, each exactly what the manifest said; null where it said nothing."""
    if kind is ColumnType.JSON:
        values = (None if value is None else json.dumps(value, ensure_ascii=False) for value in values)
    if kind in (ColumnType.TEXT, ColumnType.JSON):
        values = (None if value is None else clean_text(value) for value in values)
    return pa.array(list(values), ARROW_TYPES[kind])


def clean_text(text: str) -> str:
    """`text` without lone surrogates: JSON can spell them, UTF-8 (and so Parquet and HTML) cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_media_path(name: str) -> bool:
    """Whether dataset loaders would open the values of a text column so named as media files."""
    return name in ("file_name", "file_names") or name.endswith(("_file_name", "_file_names"))


def column_names(extras: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Manifest column -> dataset column: its own name, unless that means something else in the dataset.

    A name in `taken`, or one that loaders give to the media itself, gets the prefix `extra_`; a name that loaders would
    read as a path to media gets the suffix `_value`. A name that is free is never given up to a renamed one.
    """
    extras = sorted(extras)
    reserved = frozenset(taken) | MEDIA_COLUMNS
    free = [name for name in extras if name not in reserved and not _is_media_path(name)]
    names = {name: clean_text(name) for name in free}
    used = reserved | set(names.values())
    for name in extras:
        if name in names:
            continue
        column = clean_text(f"extra_{name}" if name in reserved else name)
        column += "_value" if _is_media_path(column) else ""
        while column in used:
            column = f"extra_{column}"
        names[name] = column
        used |= {column}
    return {name: names[name] for name in extras}
