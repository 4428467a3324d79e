"""Names and types of the dataset columns for the further columns of a manifest, which belong to the user.

Shards are sealed independently and hours apart, yet a dataset loader needs the same schema in all of them. So the type
of a column is the join over all its values in the manifest. A join does not depend on order, and one pass over the
manifest computes it in constant memory (`merge_types`). Values without a common type become JSON text; no value is
converted lossily.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import pyarrow as pa

EXACT_FLOAT_INT = 2**53  # up to here a float64 holds every whole number exactly
INT64 = 2**63

# Column names that dataset loaders (Hugging Face VideoFolder) use for the media themselves.
MEDIA_COLUMNS = frozenset({"video", "videos", "image", "images"})


class ColumnType(StrEnum):
    """The common type of all values of one column."""

    NULL = "null"  # no values
    BOOL = "bool"
    INT = "int"  # whole numbers that a float64 holds exactly
    LONG = "long"  # whole numbers that need all of int64
    FLOAT = "float"
    TEXT = "text"
    JSON = "json"  # lists, objects, larger numbers, and mixtures without a common type


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
    """The type of one JSON value."""
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
    """The narrowest type that holds the values of both; commutative, associative and idempotent."""
    if one == other or other == ColumnType.NULL:
        return one
    if one == ColumnType.NULL:
        return other
    return _WIDER.get(frozenset({one, other}), ColumnType.JSON)


def merge_types(types: dict[str, ColumnType], extra: Mapping[str, Any]) -> None:
    """Widen `types` in place by the further columns of one manifest row."""
    for name, value in extra.items():
        types[name] = common_type(types.get(name, ColumnType.NULL), column_type(value))


def arrow_column(values: Iterable[Any], type_: ColumnType) -> pa.Array:
    """The values of a column as an Arrow array, without loss; absent values are nulls."""
    if type_ is ColumnType.JSON:
        values = (None if value is None else json.dumps(value, ensure_ascii=False) for value in values)
    if type_ in (ColumnType.TEXT, ColumnType.JSON):
        values = (None if value is None else clean_text(value) for value in values)
    return pa.array(list(values), ARROW_TYPES[type_])


def clean_text(text: str) -> str:
    """`text` with lone surrogates replaced: JSON can escape them, but UTF-8 (so Parquet and HTML) cannot store them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_media_path(name: str) -> bool:
    """Whether dataset loaders would open the values of a text column of this name as media files."""
    return name in ("file_name", "file_names") or name.endswith(("_file_name", "_file_names"))


def column_names(extras: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Map each manifest column to its dataset column: the same name, unless that has another meaning in the dataset.

    A name in `taken`, or one that loaders use for the media, gets the prefix `extra_`. A name that loaders would read
    as a path to media gets the suffix `_value`. A renamed column never displaces a column whose name is free.
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
