"""No check of a manifest takes more than linear time, and none holds more than a few MB of text (P7)."""

from __future__ import annotations

import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest import check, row_validation
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.formats import delimited, limits, parquet_rows
from hv_batch.job.manifest.formats.delimited import split_csv
from hv_batch.job.manifest.formats.json_lines import split_json_lines
from hv_batch.job.manifest.formats.limits import CHUNK_BYTES
from hv_batch.job.manifest.formats.parquet_rows import ArrowRows, split_parquet
from hv_batch.job.manifest.formats.table_header import check_columns
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.sampling_params import FieldProblem

# A quadratic algorithm would need hours for the inputs below, a linear one a second.
pytestmark = pytest.mark.timeout(120)


def test_a_csv_header_of_a_million_columns_is_refused(tmp_path):
    """The names are compared in linear time, and the message gives the allowed number."""
    path = tmp_path / "wide.csv"
    path.write_text(",".join(["prompt", *map(str, range(1_000_000))]) + "\n")
    with pytest.raises(UserError, match=r"it has 1000001 columns; at most 10\d\d are allowed"):
        list(Manifest(str(path)).rows())
    with pytest.raises(ValueError, match="it has two columns named"):
        check_columns(["prompt", "a", "b", "a"])


def test_a_parquet_file_of_too_many_columns_is_refused():
    """The limit is that of CSV files."""
    table = pa.table({name: pa.array([], pa.string()) for name in ("prompt", *map(str, range(1100)))})
    with pytest.raises(ValueError, match="it has 1101 columns"):
        list(split_parquet(parquet(table)))


def test_repeated_keys_of_a_long_row_are_found_in_linear_time():
    """The repeated key is the last of many."""
    line = "{" + ",".join(f'"{key}": 1' for key in [*range(300_000), 299_999]) + "}"
    ((_, problem),) = next(split_json_lines(io.BytesIO(line.encode()))).rows()
    assert 'the key "299999" is given twice' in problem.allowed


def test_cells_without_text_count_towards_a_chunk():
    """A line of commas has no text, and needs eight bytes of memory for each of them."""
    chunks = list(split_csv(io.BytesIO(b"prompt\n" + (b"," * 50_000 + b"\n") * 60)))
    assert sum(len(chunk.records) for chunk in chunks) == 60
    assert max(sum(len(cells) for _, cells in chunk.records) for chunk in chunks) <= CHUNK_BYTES / 8 + 50_001


def test_a_record_without_a_closing_quotation_mark_does_not_hold_the_rest_of_the_file(monkeypatch):
    """A record ends at the limit, however many short cells it has; the rows after it are read."""
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 1000)
    endless = b"ok,1\n" + b'"a\nb",' * 1000 + b"\n" + b"fine,2\n"
    records = [record for chunk in split_csv(io.BytesIO(b"prompt,n\n" + endless)) for record in chunk.records]
    problems = [cells for _, cells in records if isinstance(cells, FieldProblem)]
    assert any("a record of at most 0 MiB; a quotation mark may be missing" in one.allowed for one in problems)
    assert records[0] == (2, ["ok", "1"])
    assert records[-1] == (1004, ["fine", "2"])
    delimited.csv.field_size_limit(limits.MAX_LINE_BYTES)


# ---- Parquet


def parquet(table, **options):
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)
    sink.seek(0)
    return sink


def rows_of(file):
    return [row for chunk in split_parquet(file) for row in chunk.rows()]


BOMB = """
import io, resource, sys
import pyarrow as pa, pyarrow.parquet as pq
from hv_batch.job.manifest.formats.limits import CHUNK_BYTES
from hv_batch.job.manifest.formats.parquet_rows import ArrowRows, LongRow, split_parquet

long = "x" * (10 * 2**20)
def column(values):
    return pa.DictionaryArray.from_arrays(pa.array(values, pa.int32()), pa.array([long, "short"]))
offsets = pa.array([*range(0, 502, 2), *range(501, 551)], pa.int32())
lists = pa.ListArray.from_arrays(offsets, column([0] * 500 + [1] * 50))
table = pa.table({"prompt": column([0] * 256 + [1] * 44), "notes": lists})
sink = io.BytesIO()
pq.write_table(table, sink, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False)
assert len(sink.getvalue()) < 20_000, len(sink.getvalue())
sink.seek(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
numbers = []
for chunk in split_parquet(sink):
    assert isinstance(chunk, LongRow) or chunk.table.nbytes <= max(CHUNK_BYTES, 16 * 2**20)
    numbers += [(number, "long" if not isinstance(row, dict) else len(row["prompt"])) for number, row in chunk.rows()]
assert [number for number, _ in numbers] == list(range(1, 301))
assert [row for _, row in numbers] == ["long"] * 250 + [len(long)] * 6 + [5] * 44, numbers
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_small_file_of_large_texts_is_read_in_bounded_memory():
    """A dictionary stores a text once, and every row may refer to it: 5 GB in a file of a few kB."""
    done = subprocess.run([sys.executable, "-c", BOMB], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250, "MB above what the process had before"


TABLE = pa.table(
    {
        "prompt": ["a", "b" * 50, None, "é中", "a"] * 40,
        "tags": pa.array([["x", None], None, [], ["y" * 30], ["x"]] * 40, pa.list_(pa.string())),
        "both": pa.array(
            [{"s": "q", "n": 1}, None, {"s": None, "n": None}, {"s": "q", "n": 3}, {"s": "r", "n": 4}] * 40
        ),
        "map": pa.array(
            [[("k", "v")], None, [], [("k", None), ("l", "w")], []] * 40, pa.map_(pa.string(), pa.string())
        ),
        "raw": pa.array([b"1", b"22", None, b"", b"1"] * 40, pa.binary()),
        "n": list(range(200)),
    }
)


@pytest.mark.parametrize("chunk_bytes", [64, 1000, CHUNK_BYTES])
@pytest.mark.parametrize("encoding", [{}, {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}}])
def test_the_rows_do_not_depend_on_how_a_column_is_read(monkeypatch, chunk_bytes, encoding):
    """Columns with a large dictionary are read as stored, and chunks are cut by decoded bytes; the rows are equal."""
    expected = rows_of(parquet(TABLE))
    assert [number for number, _ in expected] == list(range(1, 201))
    assert expected[3][1]["prompt"] == "é中"
    monkeypatch.setattr(limits, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(parquet_rows, "LARGE_DICTIONARY", 0)
    assert rows_of(parquet(TABLE, row_group_size=70, **encoding)) == expected
    chunks = list(split_parquet(parquet(TABLE, row_group_size=70, **encoding)))
    types = TABLE.drop_columns("raw").schema.types
    assert all(isinstance(chunk, ArrowRows) and chunk.table.schema.types == types for chunk in chunks)
    assert chunk_bytes == CHUNK_BYTES or len(chunks) >= 8


def test_the_size_of_a_dictionary_is_read_from_the_header_of_its_page():
    """It decides how a column is read; the metadata of the file only have the size of the whole column."""
    values = [f"value {number}" for number in range(5000)]
    file = parquet(pa.table({"prompt": values * 2}), dictionary_pagesize_limit=2**30)
    column = pq.read_metadata(file).row_group(0).column(0)
    expected = sum(4 + len(value) for value in values)  # each with its length
    assert parquet_rows._dictionary_bytes(column, file) == expected
    assert parquet_rows._dictionary_bytes(column, io.BytesIO(b"\0" * 10_000)) == column.total_uncompressed_size


def test_a_list_that_is_stored_as_a_run_is_refused(monkeypatch):
    """A run of a billion equal numbers takes a few bytes in the file, and gigabytes when it is read."""
    monkeypatch.setattr(parquet_rows, "MAX_REPEATED_VALUES", 1000)
    table = pa.table({"prompt": ["a"], "n": pa.array([[0] * 200_000])})
    with pytest.raises(ValueError, match=r"its column n\.list\.element unpacks \d+ bytes to 200000 values"):
        rows_of(parquet(table))
    numbers = pa.table({"prompt": ["a"], "n": pa.array([list(range(5000))])})
    assert len(rows_of(parquet(numbers, use_dictionary=False))) == 1


def test_a_row_that_is_too_long_is_a_problem_of_that_row(tmp_path, monkeypatch):
    """P6: it is reported with its number and the limit, and the other rows are read."""
    monkeypatch.setattr(parquet_rows, "MAX_LINE_BYTES", 2**20)
    monkeypatch.setattr(limits, "CHUNK_BYTES", 2**19)
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b" * (3 * 2**20), "c"]}), path)
    (first, second, third) = Manifest(str(path)).rows()
    assert (first, third) == ((1, {"prompt": "a"}), (3, {"prompt": "c"}))
    assert second == (2, FieldProblem("row", "3.0 MiB", "columns of together at most 1 MiB"))


def test_a_small_manifest_that_asks_for_too_many_samples_is_refused_before_they_are_counted(tmp_path, monkeypatch):
    """A row of a few bytes may ask for ten thousand samples, and each takes 8 bytes and a hash."""
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"prompt": "{row}", "num_videos": 10000}}\n' for row in range(10_001)))
    hashed = []
    monkeypatch.setattr(row_validation, "hash_key", hashed.append)
    with pytest.raises(UserError, match="more than 100,000,000 samples, which is the most"):
        check_manifest(Manifest(str(path)), RunConfig.model_validate({}), Store(str(tmp_path / "scratch")))
    assert not hashed


def test_a_shard_that_no_reader_could_hold_is_refused(tmp_path, monkeypatch):
    """P6: before the run begins."""
    monkeypatch.setattr(check, "MAX_SHARD_SAMPLES", 20)
    path = tmp_path / "m.jsonl"
    path.write_text('{"prompt": "a", "num_videos": 21}\n')
    config = RunConfig.model_validate({"output": {"shard_size": 10**9}})
    with pytest.raises(UserError, match="a shard would have 21 samples; allowed: at most 20"):
        check_manifest(Manifest(str(path)), config, Store(str(tmp_path / "scratch")))
    few = RunConfig.model_validate({"output": {"shard_size": 10**9}, "defaults": {"num_videos": 20}})
    path.write_text('{"prompt": "a"}\n')
    assert check_manifest(Manifest(str(path)), few, Store(str(tmp_path / "scratch"))).summary.samples == 20
