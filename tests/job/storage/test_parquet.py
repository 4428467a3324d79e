"""Tables of an output root are decoded in bounded memory."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hv_batch.job.manifest.row_validation import PART_SCHEMA, encode_part
from hv_batch.job.storage import parquet
from hv_batch.job.storage.parquet import ROWS_PER_BYTE, read_parquet


def encoded(table: pa.Table, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


TABLE = pa.table({"a": list(range(1000)), "b": [f"text {n}" for n in range(1000)]}).replace_schema_metadata({"k": "v"})


@pytest.mark.parametrize("columns", [None, ["b"]])
@pytest.mark.parametrize("rows", [0, 1, 64, 1000])
def test_a_table_is_read_as_it_was_written(rows, columns):
    expected = TABLE.slice(0, rows).select(columns or TABLE.column_names)
    found = read_parquet(encoded(TABLE.slice(0, rows)), columns)
    assert found.equals(expected)
    assert found.schema.metadata == {b"k": b"v"}


def test_a_dictionary_that_stands_for_gigabytes_is_refused(monkeypatch):
    """P7: one text of 100 kB in each of 20,000 rows is a file of some kB and a table of 2 GB."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000), pa.array(["x" * 100_000]))
    data = encoded(pa.table({"a": column}), compression="zstd", store_schema=False)
    assert len(data) < 10_000
    before = pa.total_allocated_bytes()
    monkeypatch.setattr(parquet, "MAX_BYTES", 50_000_000)
    monkeypatch.setattr(parquet, "MIN_ROWS", 20_000)
    with pytest.raises(pa.ArrowInvalid, match="more than 50,000,000 bytes"):
        read_parquet(data)
    assert pa.total_allocated_bytes() - before < 1_000_000, "nothing is kept"


def test_a_table_whose_footer_declares_too_much_is_not_decoded(monkeypatch):
    monkeypatch.setattr(parquet, "MAX_BYTES", 1000)
    with pytest.raises(pa.ArrowInvalid, match="more than 1,000 bytes"):
        read_parquet(encoded(TABLE))


def test_a_table_of_a_billion_equal_rows_is_refused():
    """P7: run-length encoding stores them in a few bytes; nothing of them is decoded."""
    table = pa.table({"row": pa.array(np.ones(3_000_000, np.int8))})
    with pytest.raises(pa.ArrowInvalid, match="3,000,000 rows in"):
        read_parquet(encoded(table))


def test_a_part_of_an_index_has_fewer_rows_than_the_limit_allows():
    """The smallest rows that the check of a manifest writes: ids that count up."""
    rows = 50_000
    ids = [f"k{number}" for number in range(rows)]
    columns = {"row": range(1, rows + 1), "key": ids, "id": ids, "videos": [1] * rows, "content": ["[{}, {}]"] * rows}
    part = encode_part(pa.table({name: list(values) for name, values in columns.items()}, PART_SCHEMA))
    assert read_parquet(part, ["videos"]).num_rows == rows
    assert rows < ROWS_PER_BYTE * len(part) / 2
