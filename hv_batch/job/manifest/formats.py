"""The text formats of a manifest file, in two steps: split a file into chunks, and parse a chunk into rows.

`parquet_rows` does the same for Parquet. Splitting reads the file sequentially and is cheap. Parsing is the costly
step; it needs only its chunk, so it can run in another process. A chunk is a few MB (P7), and longer rows are problems.
The time is linear in the size of the file, whatever it contains. Parsed rows are plain dicts whose values are not
validated here. A row that cannot be parsed is a FieldProblem and does not end the pass, so that all invalid rows are
reported together (P6).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from hv_batch.job.config.field_rules import KNOWN_COLUMNS, parse_text
from hv_batch.job.user_input import shorten
from hv_batch.protocol import FieldProblem

CHUNK_BYTES = 4 << 20  # about 20,000 rows of short prompts: about a second of work for one process
CHUNK_ROWS = 32_768  # of Parquet and CSV, whose rows may need far more memory once they are parsed
CELL_BYTES = 8  # that a cell counts besides its text, because empty cells take memory as well
MAX_LINE_BYTES = 16 << 20  # a prompt is a few kB, so a longer line is not a manifest row
MAX_COLUMNS = 1000  # further columns of a manifest: each becomes a metadata column, and is held during the run
UNREADABLE = "(unreadable)"  # stands for a value that cannot be shown

ParsedRow = dict[str, Any] | FieldProblem
NumberedRows = Iterator[tuple[int, ParsedRow]]


@dataclass(frozen=True, slots=True)
class JsonLines:
    """Complete lines. The row number is the line number, from 1; blank lines count."""

    first: int
    data: bytes

    def rows(self) -> NumberedRows:
        for number, line in enumerate(self.data.split(b"\n"), start=self.first):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors add
            line = line.strip()
            if line:
                yield number, _parse_line(line)

    @property
    def last(self) -> int:
        return self.first + self.data.count(b"\n")


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


def split_json_lines(file: IO[bytes]) -> Iterator[JsonLines]:
    for first, data in _line_blocks(file):
        yield JsonLines(first, data)


def _line_blocks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Blocks of complete lines, with the number of the first one. A line that is too long is truncated."""
    number, rest, skipping = 1, b"", False
    while data := file.read(CHUNK_BYTES):
        if skipping:
            _, newline, data = data.partition(b"\n")
            skipping = not newline
        end = data.rfind(b"\n")
        if end >= 0:
            block, rest = rest + data[:end], data[end + 1 :]
            yield number, block
            number += block.count(b"\n") + 1
        elif not skipping:
            rest += data
        if len(rest) > MAX_LINE_BYTES:
            yield number, rest[: MAX_LINE_BYTES + 1]
            number, rest, skipping = number + 1, b"", True
    if rest:
        yield number, rest


def _parse_line(line: bytes) -> ParsedRow:
    if len(line) > MAX_LINE_BYTES:
        start = line[:100].decode("utf-8", errors="replace")
        return FieldProblem("line", start, f"one JSON object a line, of at most {MAX_LINE_BYTES >> 20} MiB")
    try:
        row = _DECODER.decode(line.decode("utf-8"))
        if b"\\u" in line:  # only an escape can give a lone surrogate, which UTF-8 cannot store
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        allowed = "text in UTF-8"
    except RecursionError:
        allowed = "a JSON object that is not nested so deeply"
    except ValueError as error:
        reason = str(error).partition("; use sys.")[0]  # without Python's advice on its own settings
        allowed = f"one JSON object a line ({reason})"
    else:
        if isinstance(row, dict):
            return row
        allowed = "one JSON object a line"
    return FieldProblem("line", line.decode("utf-8", errors="replace"), allowed)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null, or omit the key")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shorten(name)} is given twice")
    return row


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_reject_duplicate_keys)


def split_csv(file: IO[bytes]) -> Iterator[CsvRecords]:
    """Split a comma-separated UTF-8 file, quoted as in RFC 4180. Raises ValueError if the header is invalid."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the default limit is 128 kB; the setting is global
    numbered = _csv_records(_CsvLines(file))
    _, cells = next(numbered, (1, []))
    if isinstance(cells, FieldProblem):
        raise ValueError(f"its header must be {cells.allowed}")
    header = tuple(cell.strip() for cell in cells)
    if header:
        check_columns(header)
    records, size = [], 0
    for number, cells in numbered:
        records.append((number, cells))
        size += (
            len(cells.allowed) if isinstance(cells, FieldProblem) else sum(map(len, cells)) + CELL_BYTES * len(cells)
        )
        if len(records) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield CsvRecords(header, tuple(records))
            records, size = [], 0
    if records:
        yield CsvRecords(header, tuple(records))


class _RecordTooLongError(Exception):
    """A record has more than MAX_LINE_BYTES: its quoted cells go on over many lines."""


class _CsvLines:
    """The lines of a CSV file as text. Raises _RecordTooLongError in a record that is too long, and then continues."""

    def __init__(self, file: IO[bytes]) -> None:
        self._lines = self._decoded(file)
        self._room = MAX_LINE_BYTES
        self.number = 0  # of the last line

    def begin_record(self) -> None:
        self._room = 2 * MAX_LINE_BYTES  # a single line has at most MAX_LINE_BYTES + 1, and is reported as such

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._room < 0:
            raise _RecordTooLongError
        line = next(self._lines)
        self.number += 1
        self._room -= len(line)
        return line

    @staticmethod
    def _decoded(file: IO[bytes]) -> Iterator[str]:
        for number, block in _line_blocks(file):
            for at, line in enumerate(block.split(b"\n"), start=number):
                if at == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield line.decode("utf-8", "surrogateescape") + "\n"


def _csv_records(lines: _CsvLines) -> Iterator[tuple[int, list[str] | FieldProblem]]:
    reader = csv.reader(lines, strict=True)
    while True:
        number = lines.number + 1
        lines.begin_record()
        try:
            cells = next(reader, None)
        except csv.Error as error:  # the reader continues with the next line
            yield number, FieldProblem("line", UNREADABLE, f"comma-separated cells ({error})")
            continue
        except _RecordTooLongError:
            allowed = f"a record of at most {MAX_LINE_BYTES >> 20} MiB; a quotation mark may be missing"
            yield number, FieldProblem("line", UNREADABLE, allowed)
            continue
        if cells is None:
            return
        if not any(map(_is_not_utf8, cells)):
            if cells:  # skip blank lines
                yield number, cells
        else:
            text = ",".join(cells).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            yield number, FieldProblem("line", text[:1000], "text in UTF-8")


def _is_not_utf8(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def check_columns(names: Sequence[str]) -> None:
    """Raises ValueError unless the column names of a table are unique, not too many, and include `prompt`."""
    most = MAX_COLUMNS + len(KNOWN_COLUMNS)
    if len(names) > most:
        raise ValueError(
            f"it has {len(names)} columns; at most {most} are allowed, because each becomes a column of the dataset's "
            "metadata. Combine them into one column that holds an object, or remove them"
        )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"it has two columns named {', '.join(map(shorten, twice[:5]))}; rename or remove one")
    if "prompt" not in names:
        shown = ", ".join(map(shorten, names[:20]))
        raise ValueError(f"it has no column `prompt`, but {shown}; name the column with the prompts `prompt`")
