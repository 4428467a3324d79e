"""Tables of an output root are decoded in bounded memory."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hv_batch.job.storage import parquet
from hv_batch.job.storage.parquet import read_parquet


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
    with pytest.raises(pa.ArrowInvalid, match="more than 50,000,000 bytes"):
        read_parquet(data)
    assert pa.total_allocated_bytes() - before < 1_000_000, "nothing is kept"


def test_a_table_whose_footer_declares_too_much_is_not_decoded(monkeypatch):
    monkeypatch.setattr(parquet, "MAX_BYTES", 1000)
    with pytest.raises(pa.ArrowInvalid, match="more than 1,000 bytes"):
        read_parquet(encoded(TABLE))
