"""Read one manifest row: validate its values, and split them into known columns, further columns and a key.

The key of a row names its objects in the output root, so it must be safe in a path and the same in every pass. It is
derived from the row's id or content, never from its position: a manifest that grows keeps its keys.

A null counts as an absent value in every column, because Parquet has no other way to omit one. So does a seed of -1,
which means a random seed in other tools.
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
from hv_batch.sampling_params import FieldProblem, canonical_lora

MAX_EXACT = 2**53  # a float below this size holds every whole number exactly
SLUG_CHARS = 48  # of an id that is not a valid key: enough to recognise it in a listing
MAX_DEPTH = 100  # of lists and objects in a further column; Python's own recursion limit depends on the caller
MAX_DIGITS = 1000  # of a whole number; Python does not convert more than 4,300 digits to text
DERIVED_SEED = -1
SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")

_WHOLE_OR_ID = frozenset({*WHOLE_COLUMNS, "id"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row whose values are validated one by one, without the config's defaults."""

    number: int  # in the manifest, from 1
    key: str
    id: str | None  # as written
    values: Mapping[str, Any]  # of the known columns except `id`
    extra: Mapping[str, Any]  # of the further columns
    problems: tuple[FieldProblem, ...]


def read_row(number: int, parsed: Mapping[str, Any]) -> Row:
    """Validate the values of one parsed row.

    Whole floats in whole-number columns (720.0) are accepted, because pandas writes them in columns with nulls.
    """
    values: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    problems: list[FieldProblem] = []
    row_id: Any = None
    for name, value in parsed.items():
        if value is None:
            continue
        if name == "id":
            row_id = normalise(name, value)
        elif name in ROW_RULES:
            value = normalise(name, value)
            if name == "seed" and value == DERIVED_SEED:
                continue
            values[name] = value
            if allowed := find_fault(name, value):
                problems.append(FieldProblem(name, value, allowed))
        elif _fits_json(value):
            extra[name] = value
        # Data frames write a missing number as NaN. A further column omits it; a known column must not have it.
        elif value == value:
            problems.append(FieldProblem(name, value, EXTRA_ALLOWED))
    if "prompt" not in values:
        problems.append(FieldProblem("prompt", None, ROW_RULES["prompt"][1]))
    if row_id is not None and not _is_id(row_id):
        problems.append(FieldProblem("id", row_id, ID_ALLOWED))
        row_id = None
    key = _hash_text(_CANONICAL.encode({**values, **extra})) if row_id is None else make_key(row_id)
    return Row(number=number, key=key, id=row_id, values=values, extra=extra, problems=tuple(problems))


EXTRA_ALLOWED = f"a value that JSON can hold, nested at most {MAX_DEPTH} deep: no NaN, no binary"
ID_ALLOWED = f"a text that is not blank, of at most {MAX_TEXT_CHARS} characters, or a whole number"


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT_CHARS and bool(value.strip())


def make_key(row_id: str) -> str:
    """The key for an id: the id itself if it is safe in every path, else a slug of it with a hash of it."""
    if SAFE_KEY.fullmatch(row_id) and ".." not in row_id and not row_id.endswith("."):
        return row_id
    slug = re.sub(r"[^A-Za-z0-9]+", "-", row_id[: 4 * SLUG_CHARS])[:SLUG_CHARS].strip("-") or "id"
    return f"{slug}-{hashlib.sha256(row_id.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def normalise(name: str, value: Any) -> Any:
    """The value in its column's type if the conversion is exact, else unchanged, so that the column's rule fails.

    It makes equal rows hash equally, whether JSON has 6 or Parquet 6.0.
    """
    if name == "lora":
        return canonical_lora(value)
    type_ = type(value)  # not isinstance, for which True is an int
    if type_ is str:
        return value.strip() if name == "prompt" else value
    if type_ is float and name in _WHOLE_OR_ID and value.is_integer() and abs(value) < MAX_EXACT:
        value, type_ = int(value), int
    if type_ is int and name == "id":
        return str(value) if abs(value) < 10**MAX_DIGITS else value
    if type_ is int and name in REAL_COLUMNS and abs(value) < MAX_EXACT:
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


# One encoder for all rows, because json.dumps creates one for each call. repr is used only for invalid rows.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=repr)
