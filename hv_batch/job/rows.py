"""One manifest row: what its columns may say, and reading it into values, further columns and a key.

A row's key names its objects in the output root, so it must be safe in a path and the same in every pass. It comes from
the row's id, or from the row's content, never from its position: an extended manifest keeps its keys.

A null is a value left out, in every column: Parquet has no other way to leave one out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hv_batch.protocol import RULES, SIZE_MULTIPLE, TEMPORAL_COMPRESSION, FieldProblem

MAX_FPS = 240  # beyond any display; catches a frame count written into the wrong column
MAX_VIDEOS = 10_000  # videos of one row; more is a slip of the hand
MAX_EXACT = 2**53  # a float below it is the whole number that was written
SLUG_CHARS = 48  # of an id that cannot be a key as it stands: enough to recognise it in a listing
SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")

Rule = tuple[Callable[[Any], bool], str]


def _whole_between(low: int, high: int) -> Rule:
    def is_allowed(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return is_allowed, f"a whole number from {low} to {high}"


# What a row, and the config's defaults for it, may say: the model's parameters and the job's own two.
ROW_RULES: Mapping[str, Rule] = {
    **RULES,
    "num_videos": _whole_between(1, MAX_VIDEOS),
    "fps": _whole_between(1, MAX_FPS),
}
KNOWN_COLUMNS = ("id", *ROW_RULES)
WHOLE_COLUMNS = ("height", "width", "num_frames", "num_inference_steps", "seed", "num_videos", "fps")
REAL_COLUMNS = ("guidance_scale", "cfg_scale", "guidance_rescale", "flow_shift")

# Fields on a grid, as (first allowed value, distance to the next): a refusal names the neighbours, and the choice stays
# the user's, because a changed geometry is another video.
_GRID = {
    "height": (SIZE_MULTIPLE, SIZE_MULTIPLE),
    "width": (SIZE_MULTIPLE, SIZE_MULTIPLE),
    "num_frames": (1, TEMPORAL_COMPRESSION),
}


def find_fault(field: str, value: Any) -> str | None:
    """What is allowed for `field`, if `value` is not; None if it is."""
    is_allowed, allowed = ROW_RULES[field]
    if is_allowed(value):
        return None
    if field not in _GRID or not isinstance(value, int) or isinstance(value, bool):
        return allowed
    first, step = _GRID[field]
    below = first + (value - first) // step * step
    nearest = [near for near in (below, below + step) if is_allowed(near)]
    return f"{allowed}; nearest: {' and '.join(map(str, nearest))}" if nearest else allowed


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
    values = {name: _normalise(name, written[name]) for name in KNOWN_COLUMNS if written.get(name) is not None}
    # NaN is how data frames write a missing number; in a column of ours it is refused, in the user's it is left out.
    extra = {
        name: value
        for name, value in written.items()
        if name not in KNOWN_COLUMNS and value is not None and value == value
    }
    row_id = values.pop("id", None)
    found = [
        FieldProblem(name, value, allowed) for name, value in values.items() if (allowed := find_fault(name, value))
    ]
    if "prompt" not in values:
        found.append(FieldProblem("prompt", None, ROW_RULES["prompt"][1]))
    if row_id is not None and not (isinstance(row_id, str) and row_id.strip()):
        found.append(FieldProblem("id", row_id, "a text that is not blank, or a whole number"))
        row_id = None
    found += [
        FieldProblem(name, value, "a value that JSON can hold: no NaN, no binary")
        for name, value in extra.items()
        if not _fits_json(value)
    ]
    key = _hash_content({**values, **extra}) if row_id is None else make_key(row_id)
    return Row(number=number, key=key, id=row_id, values=values, extra=extra, problems=tuple(found))


def make_key(row_id: str) -> str:
    """The id itself where it is safe in every path, else a slug of it and a hash that keeps it apart from others."""
    if SAFE_KEY.fullmatch(row_id) and ".." not in row_id and not row_id.endswith("."):
        return row_id
    slug = re.sub(r"[^A-Za-z0-9]+", "-", row_id[: 4 * SLUG_CHARS])[:SLUG_CHARS].strip("-") or "id"
    return f"{slug}-{hashlib.sha256(row_id.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def _normalise(name: str, value: Any) -> Any:
    """The value in its column's type where that changes nothing, else as it stands, for the rules to refuse.

    Makes equal rows hash equally, whether JSON wrote 6 or Parquet 6.0.
    """
    if isinstance(value, bool):
        return value
    if name == "prompt" and isinstance(value, str):
        return value.strip()  # spec section 1
    if name in REAL_COLUMNS and isinstance(value, int) and abs(value) < MAX_EXACT:
        return float(value)
    if name in (*WHOLE_COLUMNS, "id") and isinstance(value, float) and value.is_integer() and abs(value) < MAX_EXACT:
        value = int(value)
    return str(value) if name == "id" and isinstance(value, int) else value


def _fits_json(value: Any) -> bool:
    if isinstance(value, str | int):  # most of all values, and dumps would be the costliest part of a row
        return True
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _hash_content(values: Mapping[str, Any]) -> str:
    # repr serves rows that are refused anyway
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
