"""hv_batch.job.manifest.formats.parquet_columns: media in a table are neither read nor carried."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.formats.parquet_rows import split_parquet
from hv_batch.job.manifest.reader import Manifest
from tests.support.manifests import check_file

MEDIA = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # the features Image, Video and Audio of `datasets`


def table(rows, size):
    data = bytes(range(256)) * (size // 256)
    return pa.table(
        {
            "video": pa.array([{"bytes": data, "path": f"{n}.mp4"} for n in range(rows)], MEDIA),
            "prompt": [f"a ball {n}" for n in range(rows)],
            "frames": pa.array([[{"bytes": b"x", "path": None}]] * rows, pa.list_(MEDIA)),
            "video.fps": [24.0] * rows,
            "hash": pa.array([b"0" * 16] * rows, pa.binary(16)),
            "meta": [{"score": 1.5, "tags": ["a"]}] * rows,
        }
    )


def test_media_columns_are_left_out_and_named(tmp_path):
    """They are in no record and no table, and one note says so. A column whose name begins alike is read."""
    pq.write_table(table(20, 512), tmp_path / "m.parquet", row_group_size=7)
    index = check_file(tmp_path / "m.parquet")
    assert index.summary.extra_kinds.keys() == {"video.fps", "meta"}
    assert index.summary.warnings == (
        "columns of media and other binary data are neither read nor carried: video, frames, hash",
    )
    samples = list(index)
    assert [sample.params.prompt for sample in samples] == [f"a ball {n}" for n in range(20)]
    assert samples[0].extra == {"video.fps": 24.0, "meta": {"score": 1.5, "tags": ["a"]}}


def test_media_columns_are_not_read_from_the_file():
    """P7: 60 rows of 1 MB need as much memory and as few reads as the same rows without media."""
    sink = io.BytesIO()
    pq.write_table(table(60, 1 << 20), sink, compression="none", use_dictionary=False, row_group_size=20)
    assert len(sink.getvalue()) > 60 << 20
    file = _CountingFile(sink.getvalue())
    before = pa.total_allocated_bytes()
    rows = [row for chunk in split_parquet(file) for _, row in chunk.rows()]
    assert len(rows) == 60
    assert file.bytes_read < 1 << 20
    assert pa.total_allocated_bytes() - before < 8 << 20


class _CountingFile(io.BytesIO):
    bytes_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.bytes_read += len(data)
        return data


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 20])
def test_large_dictionaries_and_media_are_independent(chunk_bytes, monkeypatch):
    """A table that is read as it is stored has the same rows with and without its media columns."""
    monkeypatch.setattr(limits, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("hv_batch.job.manifest.formats.parquet_rows.LARGE_DICTIONARY", 0)
    whole = table(30, 256)

    def rows(kept):
        sink = io.BytesIO()
        pq.write_table(kept, sink, row_group_size=11)
        return [row for chunk in split_parquet(sink) for row in chunk.rows()]

    assert rows(whole) == rows(whole.drop_columns(["video", "frames", "hash"]))


def test_text_that_is_not_marked_as_text_is_read(tmp_path):
    """Some writers store text as plain bytes. A prompt is text; bytes that are not UTF-8 are a problem of their row."""
    columns = {"prompt": pa.array([b"a \xc3\xa4", b"\xff"]), "other": pa.array([b"x", b"y"])}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    (_, first), (number, problem) = Manifest(str(tmp_path / "m.parquet")).rows()
    assert first == {"prompt": "a ä"}
    assert (number, problem.field) == (2, "row")
    pq.write_table(pa.table({"text": pa.array([b"a"])}), tmp_path / "m.parquet")
    assert [sample.params.prompt for sample in check_file(tmp_path / "m.parquet", columns={"prompt": "text"})] == ["a"]
