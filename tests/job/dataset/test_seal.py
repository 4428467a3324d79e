"""Sealing a shard into a dataset (P1, P2, P3)."""

from __future__ import annotations

import io
import itertools
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.dataset.seal import COLUMNS, HOOK_COLUMNS, LORA_COLUMN, SCORE_COLUMNS, seal_shard
from hv_batch.job.failure import FailureClass
from hv_batch.job.manifest.extra_columns import (
    ColumnType,
    arrow_column,
    column_names,
    column_type,
    common_type,
    merge_types,
)
from hv_batch.job.records import commits
from hv_batch.job.storage import canonical_json
from hv_batch.job.storage.store import Store
from tests.support.rendered_roots import make_commit, make_failure, make_quarantine, make_sample

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KINDS = st.sampled_from(list(ColumnType))
NAMES = st.sampled_from(["id", "file_name", "extra_file_name", "video", "a_file_names", "topic", "extra_id", "Id", ""])


def read_table(store: Store, shard: int = 0):
    return pq.read_table(io.BytesIO(store.get(layout.metadata_key(shard))))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


def test_sealed_shard_reads_back_in_plan_order(store):
    """P1: one row for each committed video, with typed columns, then the user's columns."""
    samples = [make_sample(n, extra={"topic": f"t{n}", "score": n / 2}) for n in (1, 2, 3)]
    for sample in reversed(samples):
        assert commits.commit(store, make_commit(sample))
    assert seal_shard(store, 0, [s.key for s in samples])
    table = read_table(store)
    own = [*COLUMNS, *LORA_COLUMN, *SCORE_COLUMNS, *HOOK_COLUMNS]
    assert table.column_names == ["file_name", *own, "score", "topic"]
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == ["s001", "s002", "s003"]
    assert rows[1]["seed"] == 1002
    assert rows[1]["topic"] == "t2"
    assert rows[1]["score"] == 1.0
    assert (rows[1]["height"], rows[1]["width"], rows[1]["num_frames"]) == (128, 96, 17)
    record = commits.read_commit(store, 0, "s002")
    assert layout.media_dir(0) + rows[1]["file_name"] == record["file"]


def test_second_seal_is_a_no_op(store):
    """P1: a sealed shard is not written again, and its records are not read again."""
    commits.commit(store, make_commit(make_sample(1)))
    assert seal_shard(store, 0, ["s001"])
    before = store.get(layout.metadata_key(0))
    store.delete(layout.commit_key(0, "s001"))
    assert not seal_shard(store, 0, ["s001"])
    assert store.get(layout.metadata_key(0)) == before


@pytest.mark.parametrize("backend", ["disk", "memory"])
def test_bytes_do_not_depend_on_how_the_run_went(tmp_path, backend):
    """P2: another order of completion, other timings, attempts, versions and dates give the same bytes."""
    samples = [make_sample(n, extra={"topic": n}) for n in range(1, 5)]
    sealed = []
    for night in range(2):
        url = f"memory://{tmp_path.name}/{night}" if backend == "memory" else str(tmp_path / str(night))
        store = Store(url)
        for sample in random.Random(night).sample(samples, len(samples)):
            reports = {"denoise": {"seconds": 1.0 + night, "node": str(night)}}
            failed = [make_failure(FailureClass.INFRA)] * night
            record = make_commit(sample, stages=reports, failures=failed, versions={"ray": str(night)})
            commits.commit(store, record | {"created_at": f"2026-01-0{night + 1}"})
        assert seal_shard(store, 0, [s.key for s in samples])
        sealed.append(store.get(layout.metadata_key(0)))
    assert sealed[0] == sealed[1]


def test_quarantined_sample_is_absent(store):
    """P5: the rest of the shard is a valid dataset; a late commit takes precedence (P1)."""
    for number in (1, 3):
        commits.commit(store, make_commit(make_sample(number)))
    commits.quarantine(store, make_quarantine(make_sample(2)))
    store.put(layout.quarantine_key(0, "s003"), canonical_json.encode(make_quarantine(make_sample(3))))
    assert seal_shard(store, 0, ["s001", "s002", "s003"])
    assert read_table(store)["id"].to_pylist() == ["s001", "s003"]


def test_pending_sample_stops_the_seal(store):
    """P1: a shard is sealed only if every sample is terminal; the error names the pending one."""
    commits.commit(store, make_commit(make_sample(1)))
    with pytest.raises(ValueError, match="'s002' is still pending"):
        seal_shard(store, 0, ["s001", "s002"])
    assert not store.exists(layout.metadata_key(0))


def test_shard_without_any_video_seals_without_a_row_group(store):
    """P5: the Hugging Face loader fails on a row group of size 0."""
    commits.quarantine(store, make_quarantine(make_sample(1)))
    assert seal_shard(store, 0, ["s001"])
    table = pq.ParquetFile(io.BytesIO(store.get(layout.metadata_key(0))))
    assert table.metadata.num_rows == 0
    assert table.metadata.num_row_groups == 0
    assert table.schema_arrow.names[0] == "file_name"


def test_all_shards_share_one_schema(store):
    """P3: loaders refuse shards with different schemas, so the types of the whole manifest are used in each."""
    extras = [{"score": 1}, {"score": 2}, {"score": 3}, {"score": 4}, {"score": 0.5, "topic": "sea"}, {"mix": [1]}]
    samples = [make_sample(number, extra=extra) for number, extra in enumerate(extras, start=1)]
    kinds: dict[str, ColumnType] = {}
    for sample in samples:
        merge_types(kinds, sample.extra)
        commits.commit(store, make_commit(sample))
    for shard, members in itertools.groupby(samples, key=lambda sample: sample.shard):
        assert seal_shard(store, shard, [sample.key for sample in members], kinds)
    first, second = read_table(store, 0), read_table(store, 1)
    assert first.schema == second.schema
    assert first["score"].to_pylist() == [1.0, 2.0, 3.0, 4.0]
    assert second["topic"].to_pylist() == ["sea", None]
    assert second["mix"].to_pylist() == [None, "[1]"]


def test_clashing_columns_keep_both_values(store):
    """P1: a user's column with the name of an hv_batch column is renamed; the hv_batch column is not changed."""
    extra = {"seed_note": "x", "sha256": "mine", "file_name": "old.mp4", "video": "v", "source_file_name": "a.mov"}
    commits.commit(store, make_commit(make_sample(1, extra=extra)))
    assert seal_shard(store, 0, ["s001"])
    row = read_table(store).to_pylist()[0]
    assert row["file_name"].startswith("s001-")
    assert row["sha256"] != "mine"
    assert row["extra_sha256"] == "mine"
    assert row["extra_file_name_value"] == "old.mp4"
    assert row["extra_video"] == "v"
    assert row["source_file_name_value"] == "a.mov"
    assert row["seed_note"] == "x"


def test_text_that_utf8_cannot_hold_does_not_stop_the_seal(store):
    """P5: JSON can hold a lone surrogate; one such prompt must not prevent a seal."""
    commits.commit(store, make_commit(make_sample(1, prompt="a \ud800 bird", extra={"\udfff": "\ud800"})))
    assert seal_shard(store, 0, ["s001"])
    assert read_table(store)["prompt"].to_pylist() == ["a ? bird"]


@given(KINDS, KINDS, KINDS)
def test_join_does_not_depend_on_order(a, b, c):
    """P2: the type of a column does not depend on the order of its values."""
    assert common_type(a, b) == common_type(b, a)
    assert common_type(a, common_type(b, c)) == common_type(common_type(a, b), c)
    assert common_type(a, a) == a


@given(st.lists(JSON, max_size=6))
def test_column_gives_back_every_value(values):
    """P1: the user's columns are copied into the metadata without change, whatever mixture of values they hold."""
    kinds: dict[str, ColumnType] = {}
    for value in values:
        merge_types(kinds, {"c": value})
    kind = kinds.get("c", ColumnType.NULL)
    read = arrow_column(values, kind).to_pylist()
    if kind is ColumnType.JSON:
        read = [None if text is None else json.loads(text) for text in read]
    assert read == values


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (2**53, ColumnType.INT),
        (2**53 + 1, ColumnType.LONG),
        (2**63, ColumnType.JSON),
        (True, ColumnType.BOOL),
        ([], ColumnType.JSON),
    ],
)
def test_kind_of_edges(value, kind):
    """P1: no integer is changed: beyond the exact range of float64, and beyond int64, the type changes."""
    assert column_type(value) is kind


@given(st.lists(NAMES, unique=True))
def test_column_names_are_unique_and_mean_nothing_else(names):
    """P1: a user's column never gets the name of an hv_batch column, of another user's column, or of a media column."""
    taken = ["file_name", *COLUMNS]
    named = column_names(names, taken)
    columns = list(named.values())
    assert len({*columns, *taken}) == len(columns) + len(taken)
    assert not any(column.endswith(("_file_name", "_file_names")) or column == "video" for column in columns)
    assert named.get("topic", "topic") == "topic"
    assert named == column_names(reversed(names), taken)
