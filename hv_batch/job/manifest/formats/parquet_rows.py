"""Parquet files as manifests: split a file into chunks of rows, and convert a chunk to Python values.

A Parquet file of a few kB can hold gigabytes of text: a dictionary page has a long text once, and each row refers to
it. Columns with a large dictionary are therefore read as they are stored, and the decoded size of each row is computed
before it is decoded. A chunk has a few MB of decoded text (P7), and a longer row is a problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from itertools import groupby
from typing import IO, Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hv_batch.job.config.field_rules import KNOWN_COLUMNS
from hv_batch.job.manifest.column_mapping import NO_MAPPING, ColumnMapping
from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.formats.limits import CHUNK_ROWS, MAX_LINE_BYTES, UNREADABLE, NumberedRows, ParsedRow
from hv_batch.job.manifest.formats.parquet_columns import ReadColumns, holds_bytes, read_columns
from hv_batch.job.manifest.formats.table_header import check_columns
from hv_batch.sampling_params import FieldProblem

BATCH_ROWS = 256  # rows decoded at a time: a few MB even with long prompts
PAGE_BYTES = 1 << 20  # of one read of a column chunk
BATCH_BYTES = 64 << 20  # of a decoded batch at most, as far as the file's metadata tell
LARGE_DICTIONARY = 2 << 20  # bytes; writers end a dictionary at 1 MiB by default
# Values of a repeated column that a row group may have, and for each byte of the file. Run-length encoding stores a
# list of a billion equal numbers in a few bytes.
MAX_REPEATED_VALUES = 1 << 24
MAX_VALUES_PER_BYTE = 64
HEADER_BYTES = 64  # of a page, as far as its size is in it


@dataclass(frozen=True, slots=True)
class ArrowRows:
    """Rows of a Parquet file, numbered from 1."""

    first: int
    table: pa.Table
    left_out: tuple[str, ...] = ()  # columns of media and other binary data, which are not read

    def rows(self) -> NumberedRows:
        number = self.first
        for batch in self.table.to_batches(max_chunksize=BATCH_ROWS):
            for row in _batch_rows(batch):
                yield number, row
                number += 1

    @property
    def last(self) -> int:
        return self.first + len(self.table) - 1


@dataclass(frozen=True, slots=True)
class LongRow:
    """A row that is too long to be decoded."""

    first: int
    num_bytes: int

    def rows(self) -> NumberedRows:
        allowed = f"columns of together at most {MAX_LINE_BYTES >> 20} MiB"
        yield self.first, FieldProblem("row", f"{self.num_bytes / 2**20:.1f} MiB", allowed)

    @property
    def last(self) -> int:
        return self.first


def split_parquet(file: IO[bytes], columns: ColumnMapping = NO_MAPPING) -> Iterator[ArrowRows | LongRow]:
    """Split a Parquet file. Raises ValueError if its columns are invalid, and pyarrow's errors if it is damaged."""
    # With buffer_size, the pages of a column chunk are streamed; without it, a whole row group would be held.
    options: dict[str, Any] = {"buffer_size": PAGE_BYTES, "pre_buffer": False}
    metadata = pq.read_metadata(file)
    plain = pq.ParquetFile(file, metadata=metadata, **options)
    read = read_columns(plain.schema_arrow, columns)
    check_columns(read.names)
    plans = [_plan_row_group(metadata.row_group(group), file, read) for group in range(metadata.num_row_groups)]
    large = sorted({name for plan in plans for name in plan.large_dictionaries})
    parquet = pq.ParquetFile(file, metadata=metadata, read_dictionary=large, **options) if large else plain

    def rows(first: int, batches: list[pa.RecordBatch]) -> ArrowRows:
        return ArrowRows(first, pa.Table.from_batches(batches).rename_columns(list(read.names)), read.left_out)

    first, count, size = 1, 0, 0
    batches: list[pa.RecordBatch] = []
    for batch, sizes in _batches(parquet, plans, read):
        for part, num_bytes in _cut(batch, sizes):
            if num_bytes > MAX_LINE_BYTES or size + num_bytes > limits.CHUNK_BYTES or count + len(part) > CHUNK_ROWS:
                if batches:
                    yield rows(first, batches)
                first, batches, count, size = first + count, [], 0, 0
            if num_bytes > MAX_LINE_BYTES:
                yield LongRow(first, num_bytes)
                first += 1
                continue
            batches.append(part.cast(read.schema) if large else part)
            count, size = count + len(part), size + num_bytes
    if batches:
        yield rows(first, batches)


@dataclass(frozen=True, slots=True)
class _RowGroupPlan:
    """How a row group is read."""

    batch_rows: int
    large_dictionaries: tuple[str, ...]  # paths of columns


def _plan_row_group(group: Any, file: IO[bytes], read: ReadColumns) -> _RowGroupPlan:
    """Decide from the metadata how many rows are decoded at a time. Raises ValueError if a column cannot be read so."""
    columns = [column for column in map(group.column, range(group.num_columns)) if read.includes(column.path_in_schema)]
    row_bytes = sum(column.total_uncompressed_size for column in columns) / max(1, group.num_rows)
    large = []
    for column in columns:
        values, stored = column.num_values, max(1, column.total_compressed_size)
        if values > max(MAX_REPEATED_VALUES, MAX_VALUES_PER_BYTE * stored) and values > group.num_rows:
            raise ValueError(
                f"its column {column.path_in_schema} unpacks {stored} bytes to {values} values in one row group; write "
                "the lists as JSON text, or remove the column"
            )
        if column.physical_type != "BYTE_ARRAY" or column.total_uncompressed_size * BATCH_ROWS <= limits.CHUNK_BYTES:
            continue
        if "DELTA_BYTE_ARRAY" in column.encodings:  # a value may repeat all of the value before it
            row_bytes += column.total_uncompressed_size
        if column.has_dictionary_page:
            dictionary = _dictionary_bytes(column, file)
            if dictionary > LARGE_DICTIONARY or values > group.num_rows:
                large.append(column.path_in_schema)
            else:
                row_bytes += dictionary
    return _RowGroupPlan(max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1, row_bytes)))), tuple(large))


def _dictionary_bytes(column: Any, file: IO[bytes]) -> int:
    """The uncompressed size of the dictionary page: the second number of its header, which is in Thrift's compact form.

    The size of the column chunk if the header cannot be read.
    """
    file.seek(column.dictionary_page_offset)
    header = file.read(HEADER_BYTES)
    at = 0
    try:
        for _ in range(2):  # the type of the page, then its size; each with the byte of its field before it
            if header[at] != 0x15:  # the next field, a number
                raise IndexError
            at, number, shift = at + 1, 0, 0
            while header[at] & 0x80:
                number |= (header[at] & 0x7F) << shift
                at, shift = at + 1, shift + 7
            number = (number | header[at] << shift) >> 1  # zigzag; a size is not negative
            at += 1
    except IndexError:
        return int(column.total_uncompressed_size)
    return number


def _batches(
    parquet: pq.ParquetFile, plans: list[_RowGroupPlan], read: ReadColumns
) -> Iterator[tuple[pa.RecordBatch, np.ndarray | None]]:
    """Yield batches in order, with the decoded bytes of each row if these may differ from what the batch holds."""
    is_stored = any(plan.large_dictionaries for plan in plans)

    def one_read(number: int) -> tuple[int, int]:
        # Arrow cannot join the dictionaries of two row groups in a nested column.
        return plans[number].batch_rows, number if is_stored else -1

    for (batch_rows, _), numbers in groupby(range(len(plans)), key=one_read):
        for batch in read.batches(parquet, batch_rows, list(numbers)):
            has_dictionary = any(_has_dictionary(kind) for kind in batch.schema.types)
            is_small = not has_dictionary and batch.nbytes <= limits.CHUNK_BYTES
            yield batch, None if is_small else _row_bytes(batch.columns, len(batch))


def _cut(batch: pa.RecordBatch, sizes: np.ndarray | None) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Cut a batch into parts of at most CHUNK_BYTES each, with their bytes; a longer row is a part of its own."""
    if sizes is None:
        yield batch, batch.nbytes
        return
    start, size = 0, 0
    for row, num_bytes in enumerate(sizes.tolist()):
        if row > start and size + num_bytes > limits.CHUNK_BYTES:
            yield batch.slice(start, row - start), size
            start, size = row, 0
        size += num_bytes
    yield batch.slice(start), size


def _has_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) or any(
        _has_dictionary(kind.field(number).type) for number in range(kind.num_fields)
    )


def _row_bytes(columns: Iterable[pa.Array], rows: int) -> np.ndarray:
    return np.sum([np.zeros(rows, np.int64), *map(_value_bytes, columns)], axis=0)


def _value_bytes(array: pa.Array) -> np.ndarray:
    """The bytes of each value of a column once it is decoded; approximate, and without overhead."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = _value_bytes(array.dictionary)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return np.where(array.is_null().to_numpy(zero_copy_only=False), 0, np.append(lengths, 0)[indices])
    if any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)) or (
        pa.types.is_large_binary(kind)
    ):
        return pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_struct(kind):
        return _row_bytes(array.flatten(), len(array))
    if pa.types.is_map(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        below = [array.keys, array.items] if pa.types.is_map(kind) else [array.values]
        offsets = array.offsets.to_numpy(zero_copy_only=False)
        totals = np.append(0, np.cumsum(_row_bytes(below, len(below[0]))))
        return totals[offsets[1:]] - totals[offsets[:-1]]
    return np.full(len(array), array.nbytes // max(1, len(array)), np.int64)


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
        if field.name in KNOWN_COLUMNS and holds_bytes(field.type):
            column = column.cast(pa.string())  # text of a writer that does not mark it as such
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
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, UUID):
        return str(value)
    return value.isoformat() if hasattr(value, "isoformat") else value
