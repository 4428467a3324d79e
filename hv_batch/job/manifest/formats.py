"""The three formats of a manifest file, in two steps: split a file into chunks, and parse a chunk into rows.

Splitting reads the file sequentially and is cheap. Parsing is the costly step; it needs only its chunk, so it can run
in another process. A chunk is a few MB (P7). Parsed rows are plain dicts whose values are not validated here. A row
that cannot be parsed is a FieldProblem and does not end the pass, so that all invalid rows are reported together (P6).
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hv_batch.job.config.field_rules import parse_text
from hv_batch.job.user_input import shorten
from hv_batch.protocol import FieldProblem

CHUNK_BYTES = 4 << 20  # about 20,000 rows of short prompts: about a second of work for one process
CHUNK_ROWS = 32_768  # of Parquet and CSV, whose rows may need far more memory once they are parsed
MAX_LINE_BYTES = 16 << 20  # a prompt is a few kB, so a longer line is not a manifest row
BATCH_ROWS = 256  # Parquet rows converted to Python values at a time: a few MB even with long prompts
UNREADABLE = "(unreadable)"  # stands for a value that cannot be shown
PAGE_BYTES = 1 << 20  # of one read of a Parquet column chunk

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


@dataclass(frozen=True, slots=True)
class ArrowRows:
    """Rows of a Parquet file, numbered from 1."""

    first: int
    table: pa.Table

    def rows(self) -> NumberedRows:
        number = self.first
        for batch in self.table.to_batches(max_chunksize=BATCH_ROWS):
            for row in _batch_rows(batch):
                yield number, row
                number += 1

    @property
    def last(self) -> int:
        return self.first + len(self.table) - 1


Content = JsonLines | CsvRecords | ArrowRows


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
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shorten(next(name for name in names if names.count(name) > 1))} is given twice")
    return row


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_reject_duplicate_keys)


def split_csv(file: IO[bytes]) -> Iterator[CsvRecords]:
    """Split a comma-separated UTF-8 file, quoted as in RFC 4180. Raises ValueError if the header is invalid."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the default limit is 128 kB; the setting is global
    numbered = _csv_records(csv.reader(_csv_lines(file), strict=True))
    _, cells = next(numbered, (1, []))
    if isinstance(cells, FieldProblem):
        raise ValueError(f"its header must be {cells.allowed}")
    header = tuple(cell.strip() for cell in cells)
    if header:
        check_columns(header)
    records, size = [], 0
    for number, cells in numbered:
        records.append((number, cells))
        size += len(cells.allowed) if isinstance(cells, FieldProblem) else sum(map(len, cells))
        if len(records) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield CsvRecords(header, tuple(records))
            records, size = [], 0
    if records:
        yield CsvRecords(header, tuple(records))


def _csv_records(reader: Any) -> Iterator[tuple[int, list[str] | FieldProblem]]:
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:  # the reader continues with the next line
            yield number, FieldProblem("line", UNREADABLE, f"comma-separated cells ({error})")
            continue
        if cells is None:
            return
        if not any(map(_is_not_utf8, cells)):
            if cells:  # skip blank lines
                yield number, cells
        else:
            text = ",".join(cells).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            yield number, FieldProblem("line", text[:1000], "text in UTF-8")


def _csv_lines(file: IO[bytes]) -> Iterator[str]:
    for number, block in _line_blocks(file):
        for at, line in enumerate(block.split(b"\n"), start=number):
            if at == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield line.decode("utf-8", "surrogateescape") + "\n"


def _is_not_utf8(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def check_columns(names: Sequence[str]) -> None:
    """Raises ValueError unless the column names of a table are unique and include `prompt`."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"it has two columns named {', '.join(map(shorten, twice[:5]))}; rename or remove one")
    if "prompt" not in names:
        shown = ", ".join(map(shorten, names[:20]))
        raise ValueError(f"it has no column `prompt`, but {shown}; name the column with the prompts `prompt`")


def split_parquet(file: IO[bytes]) -> Iterator[ArrowRows]:
    """Split a Parquet file. Raises ValueError if its columns are invalid, and pyarrow's errors if it is damaged."""
    # With buffer_size, the pages of a column chunk are streamed; without it, a whole row group would be held.
    parquet = pq.ParquetFile(file, buffer_size=PAGE_BYTES, pre_buffer=False)
    check_columns(parquet.schema_arrow.names)
    first, batches, rows, size = 1, [], 0, 0
    for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
        batches.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield ArrowRows(first, pa.Table.from_batches(batches))
            first, batches, rows, size = first + rows, [], 0, 0
    if batches:
        yield ArrowRows(first, pa.Table.from_batches(batches))


# Arrow types whose Python values are JSON values.
_PLAIN = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)


def _batch_rows(batch: pa.RecordBatch) -> list[ParsedRow]:
    """Parse a batch. If a value has no Python equivalent (not UTF-8, the year 10000), parse it row by row."""
    try:
        return list(_convert(batch))
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [FieldProblem("row", UNREADABLE, f"values that can be read ({error})")]
        return [row for at in range(len(batch)) for row in _batch_rows(batch.slice(at, 1))]


def _convert(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    columns = []
    for column, field in zip(batch.columns, batch.schema, strict=True):
        if pa.types.is_timestamp(field.type):
            # Python's datetime has microseconds; the conversion of nanoseconds would need pandas.
            column = column.cast(pa.timestamp("us", field.type.tz), safe=False)
        values = column.to_pylist()
        columns.append(values if any(is_plain(field.type) for is_plain in _PLAIN) else map(_to_json, values))
    names = batch.schema.names
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_json(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(below) for below in value]
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value.isoformat() if hasattr(value, "isoformat") else value
