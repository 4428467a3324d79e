"""Consecutive rows with the same columns, judged together: column by column, for a third of what they cost one by one.

Only what is plainly good is judged here. Where anything about a block is unusual (a problem, values of several types, a
list) `judge_block` says nothing, and its rows are judged one by one. To the byte both ways say the same: this one
applies the functions of `rows` to the different values of a column, and puts the texts together that a row would give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quote
from types import NoneType
from typing import Any

from hv_batch.job.columns import Kind, join, kind_of
from hv_batch.job.formats import MAX_LINE_BYTES
from hv_batch.job.rows import ROW_RULES, WHOLE_OR_ID, find_fault, fits_json, hash_text, is_id, make_key, normalise
from hv_batch.protocol import MAX_SEED, Shape

# How JSON writes the values that a column of one type may have: as `json.dumps` does.
_TEXT: Mapping[type, Callable[[Any], str]] = {
    str: quote,
    int: int.__repr__,
    float: float.__repr__,
    bool: lambda value: "true" if value else "false",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Good rows; every list has one entry a row."""

    keys: list[str]
    ids: list[str | None]
    videos: list[int]
    contents: list[str]  # what `judge` writes into the index
    shapes: Counter[Shape]  # samples by shape
    kinds: dict[str, Kind]  # of the further columns that have a value, in the order in which the rows bring them
    firsts: dict[str, int]  # the row that has the first value of each, from 0


@dataclass(frozen=True, slots=True)
class _Column:
    values: Sequence[Any]  # normalised, None for a null
    texts: Sequence[str | None]  # as JSON


def judge_block(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], cfg_degree: int
) -> Judged | None:
    """Rows whose columns are `names`, in this order; None where they have to be looked at one by one."""
    columns: dict[str, _Column] = {}
    for name, written in zip(names, zip(*(row.values() for row in rows), strict=True), strict=True):
        column = _read_column(name, written)
        if column is None:
            return None
        columns[name] = column

    def filled(name: str) -> Sequence[Any]:
        if name not in columns:
            return [defaults[name]] * len(rows)
        return [defaults[name] if value is None else value for value in columns[name].values]

    videos = filled("num_videos")
    seeds = columns["seed"].values if "seed" in columns else ()
    if "prompt" not in columns or None in columns["prompt"].values:
        return None
    if max((seed for seed in seeds if seed is not None), default=0) + max(videos) - 1 > MAX_SEED:
        return None
    if cfg_degree > 1 and min(filled("cfg_scale")) <= 1.0:
        return None
    contents = _contents(columns)
    if max(map(len, contents)) > MAX_LINE_BYTES:
        return None
    shapes = Counter[Shape]()
    for shape, count in zip(zip(*map(filled, ("height", "width", "num_frames")), strict=True), videos, strict=True):
        shapes[shape] += count
    ids = list(columns["id"].values) if "id" in columns else [None] * len(rows)
    firsts = _firsts(columns)
    return Judged(
        keys=_keys(columns, ids),
        ids=ids,
        videos=list(videos),
        contents=contents,
        shapes=shapes,
        kinds={name: _kind(columns[name].values) for name in firsts},
        firsts=firsts,
    )


def _read_column(name: str, written: Sequence[Any]) -> _Column | None:
    kinds = set(map(type, written)) - {NoneType}
    if not kinds:
        return _Column(written, written)
    kind = kinds.pop()
    if kinds or kind not in _TEXT:
        return None
    read = {value: normalise(name, value) for value in set(written) if value is not None}
    if not all(_is_allowed(name, value) for value in read.values()):
        return None
    if kind is float and name not in WHOLE_OR_ID:  # 0.0 and -0.0 are equal, but not their texts
        return _Column(written, [None if value is None else float.__repr__(value) for value in written])
    texts = {value: _TEXT[type(as_read)](as_read) for value, as_read in read.items()}
    return _Column(list(map(read.get, written)), list(map(texts.get, written)))


def _is_allowed(name: str, value: Any) -> bool:
    if name == "id":
        return is_id(value)
    return find_fault(name, value) is None if name in ROW_RULES else fits_json(value)


def _contents(columns: Mapping[str, _Column]) -> list[str]:
    """As `judge` writes a row: its values and its further columns, nulls left out."""
    ours = _objects(columns, filter(ROW_RULES.__contains__, columns), ": ", ", ")
    further = _objects(columns, _further(columns), ": ", ", ")
    return [f"[{values}, {extra}]" for values, extra in zip(ours, further, strict=True)]


def _keys(columns: Mapping[str, _Column], ids: Sequence[str | None]) -> list[str]:
    if None not in ids:
        return list(map(make_key, ids))  # type: ignore[arg-type]  # no id is None
    contents = _objects(columns, sorted(columns.keys() - {"id"}), ":", ",")
    pairs = zip(ids, contents, strict=True)
    return [hash_text(content) if row_id is None else make_key(row_id) for row_id, content in pairs]


def _objects(columns: Mapping[str, _Column], names: Iterable[str], colon: str, comma: str) -> list[str]:
    """One JSON object a row."""
    labelled = []
    for name in names:
        label = quote(name) + colon
        labelled.append([text and label + text for text in columns[name].texts])
    if not labelled:
        return ["{}"] * len(next(iter(columns.values())).texts)
    return ["{" + comma.join(filter(None, texts)) + "}" for texts in zip(*labelled, strict=True)]


def _further(columns: Iterable[str]) -> list[str]:
    return [name for name in columns if name not in ROW_RULES and name != "id"]


def _firsts(columns: Mapping[str, _Column]) -> dict[str, int]:
    found = {}
    for name in _further(columns):
        at = next((at for at, value in enumerate(columns[name].values) if value is not None), None)
        if at is not None:
            found[name] = at
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _kind(values: Iterable[Any]) -> Kind:
    """Of a column of one type, whose widest values are at its ends."""
    there = [value for value in values if value is not None]
    return join(kind_of(min(there)), kind_of(max(there)))
