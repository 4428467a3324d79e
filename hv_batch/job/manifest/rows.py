"""One manifest row: what its columns may say, and reading it into values, further columns and a key.

A row's key names its objects in the output root, so it must be safe in a path and the same in every pass. It comes from
the row's id, or from the row's content, never from its position: an extended manifest keeps its keys.

A null is a value left out, in every column: Parquet has no other way to leave one out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hv_batch.job.config.field_rules import MAX_TEXT_CHARS, REAL_COLUMNS, ROW_RULES, WHOLE_COLUMNS, find_fault
from hv_batch.protocol import FieldProblem

MAX_EXACT = 2**53  # a float below it is the whole number that was written
SLUG_CHARS = 48  # of an id that cannot be a key as it stands: enough to recognise it in a listing
MAX_DEPTH = 100  # of lists and objects in a further column; Python's own limit depends on who calls
MAX_DIGITS = 1000  # of a whole number; Python refuses to write whole numbers of more than 4,300
SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


_WHOLE_OR_ID = frozenset({*WHOLE_COLUMNS, "id"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row, judged value by value; the config's defaults are not yet filled in."""

    number: int  # in the manifest, from 1
    key: str
    id: str | None  # as written
    values: Mapping[str, Any]  # of the known columns but `id`
    extra: Mapping[str, Any]  # of the further columns
    problems: tuple[FieldProblem, ...]


def read_row(number: int, written: Mapping[str, Any]) -> Row:
    """Judge one row. Whole floats in whole-number columns (720.0) are accepted: pandas writes them beside nulls."""
    values: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    found: list[FieldProblem] = []
    row_id: Any = None
    for name, value in written.items():
        if value is None:
            continue
        if name == "id":
            row_id = normalise(name, value)
        elif name in ROW_RULES:
            values[name] = value = normalise(name, value)
            if allowed := find_fault(name, value):
                found.append(FieldProblem(name, value, allowed))
        elif _fits_json(value):
            extra[name] = value
        # NaN is how data frames write a missing number; in a column of ours it is refused, in the user's it is left out
        elif value == value:
            found.append(FieldProblem(name, value, EXTRA_ALLOWED))
    if "prompt" not in values:
        found.append(FieldProblem("prompt", None, ROW_RULES["prompt"][1]))
    if row_id is not None and not _is_id(row_id):
        found.append(FieldProblem("id", row_id, ID_ALLOWED))
        row_id = None
    key = _hash_text(_CANONICAL.encode({**values, **extra})) if row_id is None else make_key(row_id)
    return Row(number=number, key=key, id=row_id, values=values, extra=extra, problems=tuple(found))


EXTRA_ALLOWED = f"a value that JSON can hold, nested at most {MAX_DEPTH} deep: no NaN, no binary"
ID_ALLOWED = f"a text that is not blank, of at most {MAX_TEXT_CHARS} characters, or a whole number"


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT_CHARS and bool(value.strip())


def make_key(row_id: str) -> str:
    """The id itself where it is safe in every path, else a slug of it and a hash that keeps it apart from others."""
    if SAFE_KEY.fullmatch(row_id) and ".." not in row_id and not row_id.endswith("."):
        return row_id
    slug = re.sub(r"[^A-Za-z0-9]+", "-", row_id[: 4 * SLUG_CHARS])[:SLUG_CHARS].strip("-") or "id"
    return f"{slug}-{hashlib.sha256(row_id.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def normalise(name: str, value: Any) -> Any:
    """The value in its column's type where that changes nothing, else as it stands, for the rules to refuse.

    Makes equal rows hash equally, whether JSON wrote 6 or Parquet 6.0.
    """
    kind = type(value)  # exactly: True is an int to isinstance
    if kind is str:
        return value.strip() if name == "prompt" else value  # spec section 1
    if kind is float and name in _WHOLE_OR_ID and value.is_integer() and abs(value) < MAX_EXACT:
        value, kind = int(value), int
    if kind is int and name == "id":
        return str(value) if abs(value) < 10**MAX_DIGITS else value
    if kind is int and name in REAL_COLUMNS and abs(value) < MAX_EXACT:
        return float(value)
    return value


def _fits_json(value: Any, depth: int = MAX_DEPTH) -> bool:
    if isinstance(value, str | bool):
        return True
    if isinstance(value, int):
        return abs(value) < 10**MAX_DIGITS
    if isinstance(value, float):
        return abs(value) < math.inf
    if isinstance(value, list):
        return depth > 0 and all(_fits_json(below, depth - 1) for below in value)
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(name, str) and _fits_json(value[name], depth - 1) for name in value)
    return value is None


def _hash_text(canonical: str) -> str:
    """The key of a row without an id, from its content as canonical JSON."""
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# One encoder for all rows: json.dumps makes one a call. repr serves rows that are refused anyway.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=repr)
