"""Parquet files that are held in memory: the tables of shards, and the parts of an index."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """All of the table, or some columns. Raises pyarrow's errors for what is none.

    In this thread alone: those of Arrow may let go of `data` when a short command has ended and there is no interpreter
    left to take it, and then they abort the process.
    """
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return file.read(columns=list(columns) if columns else None, use_threads=False)
