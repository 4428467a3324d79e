"""Delimited text with a header: comma-separated (.csv) and tab-separated (.tsv), quoted as in RFC 4180."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from hv_batch.job.config.field_rules import parse_text
from hv_batch.job.manifest.column_mapping import NO_MAPPING, ColumnMapping
from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.formats.limits import CELL_BYTES, CHUNK_ROWS, UNREADABLE, NumberedRows
from hv_batch.job.manifest.formats.lines import BOM, line_blocks
from hv_batch.job.manifest.formats.table_header import check_columns
from hv_batch.sampling_params import FieldProblem

COMMA, TAB = ",", "\t"
CELLS = {COMMA: "comma-separated cells", TAB: "tab-separated cells"}
NAMES = {COMMA: "commas", TAB: "tabs", ";": "semicolons"}  # of the separators, in messages


@dataclass(frozen=True, slots=True)
class CsvRecords:
    """Records with their header. The row number is the number of the row's first line; the header is usually line 1."""

    header: tuple[str, ...]
    records: tuple[tuple[int, list[str] | FieldProblem], ...]

    def rows(self) -> NumberedRows:
        for number, cells in self.records:
            if isinstance(cells, FieldProblem):
                yield number, cells
            elif len(cells) != len(self.header):
                yield number, FieldProblem("line", cells, f"{len(self.header)} cells, like the header")
            else:
                yield number, {name: parse_text(name, cell) for name, cell in zip(self.header, cells, strict=True)}

    @property
    def last(self) -> int:
        return self.records[-1][0]


def split_csv(file: IO[bytes], columns: ColumnMapping = NO_MAPPING, separator: str = COMMA) -> Iterator[CsvRecords]:
    """Split a UTF-8 file, quoted as in RFC 4180. Raises ValueError if the header is invalid."""
    csv.field_size_limit(limits.MAX_LINE_BYTES)  # the default limit is 128 kB; the setting is global
    lines = _CsvLines(file)
    numbered = _csv_records(lines, separator)
    header = _read_header(numbered, lines, columns, separator)
    records, size = [], 0
    for number, cells in numbered:
        records.append((number, cells))
        size += (
            len(cells.allowed) if isinstance(cells, FieldProblem) else sum(map(len, cells)) + CELL_BYTES * len(cells)
        )
        if len(records) == CHUNK_ROWS or size > limits.CHUNK_BYTES:
            yield CsvRecords(header, tuple(records))
            records, size = [], 0
    if records:
        yield CsvRecords(header, tuple(records))


def _read_header(
    numbered: Iterator[tuple[int, list[str] | FieldProblem]], lines: _CsvLines, columns: ColumnMapping, separator: str
) -> tuple[str, ...]:
    """The names of the columns, as they are read; empty if the file is. Raises ValueError if the header is invalid."""
    _, cells = next(numbered, (1, []))
    names = () if isinstance(cells, FieldProblem) else columns.rename(tuple(cell.strip() for cell in cells))
    if cells and "prompt" not in names:
        _check_separator(lines.header, separator)
    if isinstance(cells, FieldProblem):
        raise ValueError(f"its header must be {cells.allowed}")
    if names:
        check_columns(names)
    return names


def _check_separator(header: str, separator: str) -> None:
    """Raise ValueError if the cells of the header line are separated by another character."""
    remedies = {COMMA: "rename the file to .csv", TAB: "rename the file to .tsv", ";": "separate them by commas"}
    for other, remedy in remedies.items():
        if other in header and separator not in header:
            raise ValueError(f"its cells are separated by {NAMES[other]}, not by {NAMES[separator]}; {remedy}")


class _RecordTooLongError(Exception):
    """A record has more than MAX_LINE_BYTES: its quoted cells go on over many lines."""


class _CsvLines:
    """The lines of a CSV file as text. Raises _RecordTooLongError in a record that is too long, and then continues."""

    def __init__(self, file: IO[bytes]) -> None:
        self._lines = self._decoded(file)
        self._room = limits.MAX_LINE_BYTES
        self._begins = True  # the next line is the first of a record
        self._number = 0  # of the last line
        self.first = 0  # the number of the first line of the record
        self.header = ""  # the first line that is not blank

    def begin_record(self) -> None:
        self._room = 2 * limits.MAX_LINE_BYTES  # a single line has at most MAX_LINE_BYTES + 1, and is reported as such
        self._begins = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._room < 0:
            raise _RecordTooLongError
        line = next(self._lines)
        self._number += 1
        if self._begins:
            while line == "\n":  # here, because a file of a few kB may unpack to hundreds of millions of them
                line = next(self._lines)
                self._number += 1
            self.first, self._begins = self._number, False
            self.header = self.header or line
        self._room -= len(line)
        return line

    @staticmethod
    def _decoded(file: IO[bytes]) -> Iterator[str]:
        for number, block in line_blocks(file):
            for at, line in enumerate(block.split(b"\n"), start=number):
                if at == 1:
                    line = line.removeprefix(BOM)
                yield line.decode("utf-8", "surrogateescape") + "\n"


def _csv_records(lines: _CsvLines, separator: str) -> Iterator[tuple[int, list[str] | FieldProblem]]:
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        lines.begin_record()
        try:
            cells = next(reader, None)
        except csv.Error as error:  # the reader continues with the next line
            yield lines.first, FieldProblem("line", UNREADABLE, f"{CELLS[separator]} ({error})")
            continue
        except _RecordTooLongError:
            allowed = f"a record of at most {limits.MAX_LINE_BYTES >> 20} MiB; a quotation mark may be missing"
            yield lines.first, FieldProblem("line", UNREADABLE, allowed)
            continue
        if cells is None:
            return
        if not any(map(_is_not_utf8, cells)):
            if cells:  # skip blank lines
                yield lines.first, cells
        else:
            text = separator.join(cells).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            yield lines.first, FieldProblem("line", text[:1000], "text in UTF-8")


def _is_not_utf8(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
