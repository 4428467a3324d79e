"""Renames the columns of a manifest: `manifest.columns` of the config, `--column ours=theirs` on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from hv_batch.job.manifest.formats.limits import ParsedRow
from hv_batch.sampling_params import FieldProblem


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """Pairs of a column of hv_batch and the manifest's column that is read in its place; "" if none is read.

    A row or table that has both columns keeps its own one as a further column with the name `extra_<column>`.
    """

    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, columns: Mapping[str, str]) -> Self:
        """`columns`: column of hv_batch -> column of the manifest."""
        return cls(tuple(sorted(columns.items())))

    @property
    def sources(self) -> dict[str, str]:
        """The manifest's column of each column of hv_batch that is read from another one."""
        return {ours: theirs for ours, theirs in self.pairs if theirs}

    def rename(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names under which the columns `names` of a file or a row are read, in the same order."""
        return _rename(self.pairs, names) if self.pairs else names

    def rename_row(self, row: ParsedRow) -> ParsedRow:
        """The row with renamed columns; a row that could not be parsed is returned unchanged."""
        if not self.pairs or isinstance(row, FieldProblem):
            return row
        return dict(zip(_rename(self.pairs, tuple(row)), row.values(), strict=True))


NO_MAPPING = ColumnMapping()


@lru_cache(maxsize=256)  # most rows of a file have the same columns
def _rename(pairs: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> tuple[str, ...]:
    targets = {theirs: ours for ours, theirs in pairs if theirs}
    unread = {ours for ours, theirs in pairs if not theirs or theirs in names} - targets.keys()
    used, renamed = {*names, *targets.values()}, []
    for name in names:
        column = targets.get(name, name)
        if name in unread:
            column = f"extra_{name}"
            while column in used:
                column = f"extra_{column}"
            used.add(column)
        renamed.append(column)
    return tuple(renamed)
