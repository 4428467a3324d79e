"""Conditions on committed samples: `status --where` and `export --where`.

A condition is a column, an operator and a value: `category=cat`, `luma_mean<20`, `look=black`. A sample must satisfy
all of them; several equalities of one column mean any of their values. The columns are those of `run --where`, the
scores of the frames, `look`, the word for the scores (`hv_batch.job.quality.LOOKS`), and `hook.NAME`, a value in the
answer of the sample hook.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hv_batch.job.config.field_rules import KNOWN_COLUMNS, REAL_NUMBER
from hv_batch.job.manifest.selection import SELECTABLE, equals_text
from hv_batch.job.quality import GOOD, LOOKS, SCORES, look
from hv_batch.job.user_input import shorten
from hv_batch.protocol import UserError

LOOK = "look"
HOOK = "hook."  # before the name of a value in the answer of the sample hook
TEXT_COLUMNS = ("id", "prompt", "negative_prompt", "lora")
OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_CONDITION = re.compile(r"([^<>=!]+)(<=|>=|!=|<|>|=)(.*)", re.DOTALL)
_EXAMPLE = "category=landscape, luma_mean<20 or look=black"


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition; the value of a number column is a number, any other is text."""

    column: str
    sign: str  # a key of OPERATORS
    value: Any

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a commit record satisfies it. A sample without scores satisfies no condition on them."""
        found = column_value(record, self.column)
        if self.column in SCORES or self.column == LOOK:
            return found is not None and OPERATORS[self.sign](found, self.value)
        if self.sign in ("=", "!="):
            return equals_text(self.column, found, self.value) == (self.sign == "=")
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return is_number and OPERATORS[self.sign](found, self.value)


def parse_conditions(texts: Iterable[str]) -> list[Condition]:
    """The conditions of a command line. Raises UserError with what is allowed if one is malformed."""
    return [_parse(text) for text in texts]


def matches(record: Mapping[str, Any], conditions: Sequence[Condition]) -> bool:
    """Whether a commit record satisfies all conditions; of several `=` on one column, one is enough."""
    equal: dict[str, bool] = {}
    for condition in conditions:
        if condition.sign == "=":
            equal[condition.column] = equal.get(condition.column, False) or condition.holds(record)
        elif not condition.holds(record):
            return False
    return all(equal.values())


def check_columns(conditions: Iterable[Condition], further: Iterable[str]) -> None:
    """Raises UserError if a condition names a column that no sample has. `further` are the manifest's own columns."""
    allowed = (*sorted(further), *SELECTABLE, *SCORES, LOOK)
    for condition in conditions:
        if condition.column not in allowed and not condition.column.startswith(HOOK):
            raise UserError(
                f"--where names the column {shorten(condition.column)}, which this output root does not have; allowed: "
                f"{', '.join(shorten(name)[1:-1] for name in allowed)}."
            )


def column_value(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column in a commit record; None if the record does not have it."""
    scores = record.get("scores")
    if column == LOOK:
        return look(scores, record["produced"]["num_frames"]) if scores else None
    if column in SCORES:
        return scores[column] if scores else None
    if column.startswith(HOOK):
        return (record.get("hook") or {}).get(column.removeprefix(HOOK))
    if column in ("id", "fps"):
        return record[column]
    return record["params"].get(column) if column in KNOWN_COLUMNS else record["extra"].get(column)


def in_table(conditions: Iterable[Condition], further: Collection[str], *, has_scores: bool) -> bool:
    """Whether the table of a sealed shard answers the conditions. It renames the manifest's own columns, `further`."""
    return all(
        has_scores if column in (*SCORES, LOOK) else column not in further and not column.startswith(HOOK)
        for column in (condition.column for condition in conditions)
    )


def as_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table in the form of a commit record, as far as conditions read it."""
    scores = {name: row[name] for name in SCORES if row.get(name) is not None}
    return {
        "id": row.get("id"),
        "fps": row.get("fps"),
        "params": row,
        "produced": {"num_frames": row.get("num_frames", 1)},
        "scores": scores if len(scores) == len(SCORES) else None,
        "extra": {},
    }


def _parse(text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    if not found:
        raise UserError(
            f"--where is {shorten(text)}; allowed is a column, one of {', '.join(OPERATORS)} and a value, for example "
            f"{_EXAMPLE}."
        )
    column, sign, value = found[1].strip(), found[2], found[3]
    if column == LOOK:
        if value not in (*LOOKS, GOOD) or sign not in ("=", "!="):
            raise UserError(f"--where is {shorten(text)}; allowed: look= or look!= with {', '.join((*LOOKS, GOOD))}.")
        return Condition(column, sign, value)
    if column in SCORES or sign not in ("=", "!="):
        if column in TEXT_COLUMNS:
            raise UserError(f"--where is {shorten(text)}, but {column} is a text; allowed: {column}= and {column}!=.")
        if not REAL_NUMBER.fullmatch(value.strip()):
            raise UserError(f"--where is {shorten(text)}; allowed after {column}{sign} is a number.")
        return Condition(column, sign, float(value))
    return Condition(column, sign, value)
