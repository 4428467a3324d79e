"""Reads Parquet files that are in memory: the tables of shards and the parts of an index."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

MAX_BYTES = 1 << 30  # of a decoded table; the largest that hv_batch writes has a few MB
# Run-length encoding stores a billion equal rows in a few bytes. Each row of hv_batch has a key of its own, which takes
# two bytes even if keys are consecutive numbers.
MIN_ROWS = 1000
ROWS_PER_BYTE = 2
BATCH_ROWS = 64  # decoded at a time: a dictionary of a few kB can stand for gigabytes of text


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table, or only `columns` of it.

    Raises pyarrow's errors if `data` is not a Parquet file, and ArrowInvalid if the table is larger than MAX_BYTES or
    has more rows than a table of hv_batch of this size; no more than that is decoded. Arrow's own threads are not used:
    they may release `data` after the interpreter of a short command has ended, which aborts the process.
    """
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    groups = range(file.metadata.num_row_groups)
    size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
    rows = max(file.metadata.num_rows, sum(file.metadata.row_group(group).num_rows for group in groups))
    if rows > MIN_ROWS + ROWS_PER_BYTE * len(data):
        raise pa.ArrowInvalid(f"the table has {rows:,} rows in {len(data):,} bytes")
    schema = file.schema_arrow
    if columns:
        schema = pa.schema([field for field in schema if field.name in columns], schema.metadata)
    batches = []
    if size <= MAX_BYTES:
        size = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns) if columns else None, use_threads=False):
            size += batch.nbytes
            if size > MAX_BYTES:
                break
            batches.append(batch)
    if size > MAX_BYTES:
        raise pa.ArrowInvalid(f"the decoded table has more than {MAX_BYTES:,} bytes")
    return pa.Table.from_batches(batches, schema)
