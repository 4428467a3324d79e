"""Reads Parquet files that are in memory: the tables of shards and the parts of an index."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table, or only `columns` of it. Raises pyarrow's errors if `data` is not a Parquet file.

    Arrow's own threads are not used: they may release `data` after the interpreter of a short command has ended, which
    aborts the process.
    """
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return file.read(columns=list(columns) if columns else None, use_threads=False)
