"""Sealing a shard: one table that names and describes every video of it, so that the directory is a dataset.

Each `data/shard-N/` then holds its media and a `metadata.parquet` whose `file_name` column makes it load as a Hugging
Face VideoFolder. What this module keeps:

- **Same plan, same bytes (P2, P3).** The table holds what the plan fixes (identity, parameters, the user's own columns)
  and what the pixels fix (hashes, sizes), in plan order, and nothing that varies from one undisturbed run to the next.
  Timings, attempts, versions and dates stay in the commit records, and a run that was killed ten times seals the same
  bytes.
- **One schema in all shards.** Our columns have fixed types; those of the user come from `columns`.
- **Sealed once (P1).** The table is put only where none is, and only when every sample of the shard is terminal. It
  comes last: whoever finds it finds the rest of the shard.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hv_batch.job import layout
from hv_batch.job.dataset.lineage import lineage_table
from hv_batch.job.dataset.shard_totals import add_up, write_sums
from hv_batch.job.dataset.webdataset import write_tar
from hv_batch.job.manifest.extra_columns import ColumnType, arrow_column, clean_text, column_names, merge_types
from hv_batch.job.records.commits import LICENCE_ID, read_commit
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.parquet import read_parquet
from hv_batch.job.storage.store import Store

SCHEMA = "hv_batch/dataset/1"  # of the columns below; in the table's own metadata, beside the identity of the run

# Where each of our columns stands in a commit record, and its type. One more column is a new dataset: add with care.
COLUMNS: Mapping[str, tuple[tuple[str, ...], pa.DataType]] = {
    "id": (("id",), pa.string()),
    "key": (("key",), pa.string()),
    "row": (("row",), pa.int64()),
    "video_index": (("video_index",), pa.int64()),
    "prompt": (("params", "prompt"), pa.string()),
    "negative_prompt": (("params", "negative_prompt"), pa.string()),
    "height": (("params", "height"), pa.int64()),
    "width": (("params", "width"), pa.int64()),
    "num_frames": (("params", "num_frames"), pa.int64()),
    "fps": (("fps",), pa.int64()),
    "num_inference_steps": (("params", "num_inference_steps"), pa.int64()),
    "seed": (("params", "seed"), pa.int64()),
    "guidance_scale": (("params", "guidance_scale"), pa.float64()),
    "cfg_scale": (("params", "cfg_scale"), pa.float64()),
    "guidance_rescale": (("params", "guidance_rescale"), pa.float64()),
    "flow_shift": (("params", "flow_shift"), pa.float64()),
    "bytes": (("bytes",), pa.int64()),
    "sha256": (("sha256",), pa.string()),
    "frames_sha256": (("frames_sha256",), pa.string()),
    "fingerprint": (("fingerprint",), pa.string()),
    "licence": (("licence",), pa.string()),
}


def seal_shard(
    store: Store,
    shard: int,
    keys_in_order: Sequence[str],
    extra_kinds: Mapping[str, ColumnType] | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    webdataset: bool = False,
) -> bool:
    """Write the shard's `metadata.parquet` from its commit records, and what goes with it; True when this call did.

    `keys_in_order` are all keys of the shard in plan order; quarantined ones are left out of the table. `extra_kinds`
    are the kinds of the user's columns over the whole manifest, from `extra_columns.merge_types`; without them a column's type is
    that of this shard's values, which is right only for a run of one shard. `identity` is that of the run (`run.json`):
    weights, precisions, plan and all else behind the pixels, for whoever is given the table without its root.

    Raises ValueError when a sample is neither committed nor quarantined.
    """
    key = layout.metadata_key(shard)
    if store.exists(key):
        return False
    records = store.each(partial(_terminal_record, store, shard), keys_in_order)
    committed = [record for record in records if record is not None]
    table = metadata_table(committed, extra_kinds or {})
    # All before the seal: whoever finds a sealed shard finds these.
    write_sums(store, shard, add_up(committed))
    store.put(layout.lineage_key(shard), parquet_bytes(lineage_table(committed)))
    if webdataset:
        write_tar(store, shard, table.to_pylist())
    facts = {"hv_batch.schema": SCHEMA, "hv_batch.identity": encode(identity or {}), "hv_batch.licence": LICENCE_ID}
    return store.put_new(key, parquet_bytes(table.replace_schema_metadata(facts)))


def read_table(store: Store, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a sealed shard, all of it or some columns.

    Raises FileNotFoundError when the shard is not sealed, ValueError when its table cannot be read.
    """
    data = store.get(layout.metadata_key(shard))
    try:
        return read_parquet(data, columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{layout.metadata_key(shard)} is not a table of this program: {error}") from error


def read_rows(store: Store, shard: int) -> list[dict[str, Any]]:
    """The rows of a sealed shard's table: `file_name` and our columns, by name, in plan order.

    Raises as `read_table`, and ValueError when a column is missing.
    """
    rows: list[dict[str, Any]] = read_table(store, shard, ["file_name", *COLUMNS]).to_pylist()
    if rows and rows[0].keys() != {"file_name", *COLUMNS}:
        raise ValueError(f"{layout.metadata_key(shard)} lacks {sorted({'file_name', *COLUMNS} - rows[0].keys())}")
    return rows


def describe_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The row that a commit record becomes, without the user's own columns."""
    row = {"file_name": record["file"].rpartition("/")[2]}
    return row | {name: _value_at(record, path) for name, (path, _) in COLUMNS.items()}


def _terminal_record(store: Store, shard: int, key: str) -> dict[str, Any] | None:
    """The commit record, or None of a quarantined sample. A commit wins over a quarantine (P1)."""
    for _ in range(2):  # a late commit may take the quarantine record away between the two looks
        try:
            return read_commit(store, shard, key)
        except FileNotFoundError:
            if store.exists(layout.quarantine_key(shard, key)):
                return None
    raise ValueError(f"{layout.shard_name(shard)} cannot be sealed: sample {key!r} is still pending")


def metadata_table(records: Sequence[Mapping[str, Any]], extra_kinds: Mapping[str, ColumnType]) -> pa.Table:
    """One row a commit record, in the order given: `file_name`, our columns, then the user's by name."""
    kinds = dict(extra_kinds)
    for record in records:
        merge_types(kinds, record["extra"])
    rows = [describe_row(record) for record in records]
    columns = {"file_name": pa.array([row["file_name"] for row in rows], pa.string())}
    for name, (_, dtype) in COLUMNS.items():
        columns[name] = pa.array([row[name] for row in rows], dtype)
    for name, column in column_names(kinds, taken=columns).items():
        columns[column] = arrow_column((record["extra"].get(name) for record in records), kinds[name])
    return pa.table(columns)


def _value_at(record: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = record
    for name in path:
        value = value[name]
    return clean_text(value) if isinstance(value, str) else value


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file: equal bytes for equal tables (and one version of pyarrow)."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        if table.num_rows:  # an empty row group makes the Hugging Face loader fail, a file without one does not
            writer.write_table(table)
    return sink.getvalue()
