"""Compares two indexes of a manifest: whether it has only grown, so that the samples of before keep their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from hv_batch.job.documents.reading import parse_row
from hv_batch.job.manifest.index import Index
from hv_batch.job.manifest.row_validation import PART_SCHEMA
from hv_batch.job.user_input import shorten


def growth_problem(old: Index, new: Index) -> str | None:
    """Why the rows of `old` are not the first rows of `new`, as the first row that differs; None if they are.

    One part of each is held at a time (P7).
    """
    if new.summary.rows < old.summary.rows:
        return f"it has {new.summary.rows:,} rows, and it had {old.summary.rows:,}"
    for before, now in _in_step(old.tables(), new.tables()):
        if not now.num_rows:  # a prompt hook may drop rows
            return f"row {before['row'][0].as_py():,} is missing"
        if not before.equals(now):
            return _first_difference(before, now)
    return None


def _in_step(old: Iterator[pa.Table], new: Iterator[pa.Table]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The rows of `old`, each piece with the same number of rows of `new`, which may be divided elsewhere.

    If `new` has fewer rows, the last piece comes with none.
    """
    now = PART_SCHEMA.empty_table()
    for before in old:
        while before.num_rows:
            if not now.num_rows:
                now = next(new, now)
            if not now.num_rows:
                yield before, now
                return
            count = min(before.num_rows, now.num_rows)
            yield before.slice(0, count), now.slice(0, count)
            before, now = before.slice(count), now.slice(count)


def _first_difference(before: pa.Table, now: pa.Table) -> str:
    for was, is_now in zip(before.to_pylist(), now.to_pylist(), strict=True):
        if was != is_now:
            name, left, right = _difference(was, is_now)
            return f"the {name} of row {was['row']:,} is {shorten(right)}, and it was {shorten(left)}"
    raise AssertionError("tables with equal rows are equal")


def _difference(was: dict[str, Any], is_now: dict[str, Any]) -> tuple[str, Any, Any]:
    """The first column of two rows that differs, with both values."""
    columns = [_columns(row) for row in (was, is_now)]
    for name in (*columns[0], *columns[1]):
        left, right = (values.get(name) for values in columns)
        if left != right:
            return name, left, right
    return "content", was["content"], is_now["content"]  # equal values in another order, or of another type


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of the manifest's row; none if the content is not what the manifest check writes."""
    named = {"id": row["id"], "num_videos": row["videos"]}
    try:
        values, extra = parse_row(row["key"], row["content"])
    except ValueError:
        return named
    return {**extra, **values, **named}
