"""What the check of a manifest says about its columns: each problem and each note once, however many rows have it.

`ColumnUses` is collected row by row and merged over the chunks; `ColumnReport` is made of the whole manifest.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hv_batch.job.config.field_rules import KNOWN_COLUMNS
from hv_batch.job.config.sections import ManifestConfig
from hv_batch.job.manifest.column_aliases import Alias, find_alias
from hv_batch.job.manifest.formats.limits import MAX_COLUMNS
from hv_batch.job.manifest.rows import DERIVED_SEED, Row
from hv_batch.job.user_input import quote_argument, shorten

TYPO_LIKENESS = 0.85  # difflib ratio: "num_frame" and "heights" are above it
MAX_LISTED = 40  # names in one line


@dataclass(slots=True)
class Rows:
    """How many rows have something, and the first of them: a number, or with its file's name once it is merged."""

    first: Any
    count: int = 0

    def __str__(self) -> str:
        return f"{self.first}" + (f" and {self.count - 1:,} more" if self.count > 1 else "")


@dataclass(slots=True)
class ColumnUses:
    """The columns of the rows of one chunk; after `merge`, of the whole manifest."""

    first_rows: dict[str, Any] = field(default_factory=dict)  # further column -> first row
    foreign: dict[str, Alias] = field(default_factory=dict)  # those with another tool's name of a parameter
    lost: dict[str, Rows] = field(default_factory=dict)  # alias of a column that its rows lack -> these rows
    known: set[str] = field(default_factory=set)  # columns that any row has, also without a value
    derived_seeds: Rows | None = None  # with a seed of -1

    def add(self, number: int, parsed: Mapping[str, Any], row: Row, carried: Collection[str]) -> bool:
        """Add a row. True if it has no prompt, but a column that is probably its prompt."""
        self.known.update(parsed)
        if parsed.get("seed") == DERIVED_SEED:
            self._add_derived_seeds(number, 1)
        if len(self.first_rows) > MAX_COLUMNS:  # the check ends with an error
            return False
        for name in row.extra:
            if name not in self.first_rows:
                self.first_rows[name] = number
                alias = find_alias(name)
                if alias is not None and alias.columns != ("id",) and name not in carried:
                    self.foreign[name] = alias
        return bool(self.foreign) and self._add_losses(number, row)

    def _add_losses(self, number: int, row: Row) -> bool:
        has_other_prompt = False
        for name, alias in self.foreign.items():
            if name in row.extra and alias.is_lost(row.values):
                self.lost.setdefault(name, Rows(number)).count += 1
                has_other_prompt |= alias.columns == ("prompt",)
        return has_other_prompt

    def merge(self, other: ColumnUses, prefix: str) -> None:
        """Add the columns of the next chunk. `prefix` names its file, if the manifest has several."""
        for name, number in other.first_rows.items():
            self.first_rows.setdefault(name, f"{prefix}row {number}")
        for name, rows in other.lost.items():
            self.lost.setdefault(name, Rows(f"{prefix}row {rows.first}")).count += rows.count
        self.known |= other.known.intersection(KNOWN_COLUMNS)
        if seeds := other.derived_seeds:
            self._add_derived_seeds(f"{prefix}row {seeds.first}", seeds.count)

    def _add_derived_seeds(self, first: Any, count: int) -> None:
        self.derived_seeds = self.derived_seeds or Rows(first)
        self.derived_seeds.count += count


@dataclass(frozen=True, slots=True)
class ColumnReport:
    """The problems and notes about the columns of a manifest."""

    uses: ColumnUses
    options: ManifestConfig
    defaults: Mapping[str, Any]
    left_out: Collection[str]  # columns of binary data
    unused_folders: Collection[str]

    def problems(self) -> list[str]:
        """Parameters under other names that would be lost, and columns of the mapping that no row has."""
        lines = [self._describe_loss(name, rows) for name, rows in self.uses.lost.items()]
        for ours, theirs in self.options.columns.items():
            if theirs and ours not in self.uses.known:
                lines.append(
                    f"--column {ours}={theirs} (manifest.columns): no row has a column {shorten(theirs)}; allowed: "
                    f"{list_columns(self.uses.first_rows) or 'a column of the manifest'}"
                )
        return lines

    def notes(self) -> Iterator[str]:
        """What a reader of the plan may not expect, and does not prevent a run."""
        for name, where in self.uses.first_rows.items():
            if name not in self.options.carry and name not in self.uses.lost:
                yield from _note(name, where)
        if rows := self.uses.derived_seeds:
            yield (
                f"a seed of {DERIVED_SEED} ({rows}) is replaced by one that is derived from the run's seed and the "
                "row's key: it differs from row to row, and a resume has the same one"
            )
        if self.left_out:
            yield f"columns of media and other binary data are neither read nor carried: {list_columns(self.left_out)}"
        for folder in self.unused_folders:
            yield (
                f"the folder {shorten(folder)} sets no column, because only folders below the one that --manifest "
                "names do"
            )

    def _describe_loss(self, name: str, rows: Rows) -> str:
        alias = find_alias(name)
        assert alias is not None  # it is in `lost`
        column, carry = shorten(name), f"--carry {quote_argument(name)}"
        if alias.columns == ("prompt",):
            return (
                f"prompt is missing in rows with a column {column} ({rows}); allowed: a column `prompt`, or "
                f"--column prompt={quote_argument(name)} if that is the prompt"
            )
        ours = (" or " if alias.is_ambiguous else " and ").join(alias.columns)
        if len(alias.columns) > 1 and not alias.is_ambiguous:
            remedy = f"add columns {ours}"
        else:
            remedy = "give " + " or ".join(f"--column {one}={quote_argument(name)}" for one in alias.columns)
        return (
            f"column {column} ({rows}) does not set {ours}, which would be {self._defaults_of(alias)}; {remedy}, or "
            f"{carry} if it is data"
        )

    def _defaults_of(self, alias: Alias) -> str:
        if alias.columns == ("seed",):
            return "derived"
        return " and ".join(shorten(self.defaults[column]) for column in alias.columns) + " (defaults of the config)"


def _note(name: str, where: str) -> Iterator[str]:
    """A note on a further column whose name resembles that of a column of hv_batch."""
    alias = find_alias(name)
    if alias is not None and not alias.is_pixel_parameter:
        (ours,) = alias.columns
        yield (
            f"column {shorten(name)} (first in {where}) is not read as {ours}, only carried as metadata; "
            f"--column {ours}={quote_argument(name)} reads it"
        )
        return
    near = difflib.get_close_matches(name.lower(), KNOWN_COLUMNS, n=1, cutoff=TYPO_LIKENESS)
    if near and alias is None:
        yield (
            f"column {shorten(name)} (first in {where}) is not {near[0]!r}: it is only copied to the metadata. "
            f"Rename it if {near[0]!r} is meant"
        )


def describe_columns(carried: Collection[str], notes: Iterable[str]) -> Iterator[str]:
    """The lines of a plan and of a run about the columns of its manifest."""
    yield f"columns carried as metadata: {list_columns(carried) or 'none'}"
    yield from (f"note: {note}" for note in notes)


def list_columns(names: Collection[str]) -> str:
    """Names of columns in one line."""
    shown = ", ".join(shorten(name).removeprefix('"').removesuffix('"') or '""' for name in list(names)[:MAX_LISTED])
    return shown + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
