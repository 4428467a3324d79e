"""Seals a shard: writes the table that describes all its videos, which makes the folder a dataset.

A sealed `data/shard-N/` holds its media and a `metadata.parquet` with a `file_name` column, so it loads as a Hugging
Face VideoFolder. Invariants:

- **Same plan, same bytes (P2, P3).** The table holds, in plan order, only what the plan determines (identity,
  parameters, the user's own columns) and what the pixels determine (hashes, sizes). Timings, attempts, versions and
  dates are in the commit records only, so a run that was killed ten times seals the same bytes.
- **One schema in all shards.** The columns of hv_batch have fixed types; the types of the user's columns are those of
  the whole manifest (`hv_batch.job.manifest.extra_columns`).
- **Sealed once (P1).** The table is put if absent, and only if every sample of the shard is terminal. It is written
  last, so a sealed shard is complete.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hv_batch.job import layout
from hv_batch.job.dataset.lineage import lineage_table
from hv_batch.job.dataset.shard_totals import add_up, write_totals
from hv_batch.job.dataset.webdataset import write_tar
from hv_batch.job.documents.reading import check
from hv_batch.job.documents.schema import TableRow
from hv_batch.job.licences import records_licence
from hv_batch.job.manifest.extra_columns import ColumnType, arrow_column, clean_text, column_names, merge_types
from hv_batch.job.quality import SCORES
from hv_batch.job.records.commits import read_commit
from hv_batch.job.records.run_document import DATASET_SCHEMA, DATASET_SCHEMA_1, fingerprint
from hv_batch.job.records.withdrawn import withdrawn_keys
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.parquet import read_parquet
from hv_batch.job.storage.store import Store
from hv_batch.sampling_params import OPTIONAL_FIELDS

# The path of each column in a commit record, and its type. A new column changes the bytes of every table, so it needs a
# new schema; run.json fixes the schema of a root when the run begins. These are the columns of version 1.
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

# Version 2 adds these. A video without LoRA has null.
LORA_COLUMN: Mapping[str, tuple[tuple[str, ...], pa.DataType]] = {"lora": (("params", "lora"), pa.string())}
SCORE_COLUMNS: Mapping[str, tuple[tuple[str, ...], pa.DataType]] = {
    name: (("scores", name), pa.float64()) for name in SCORES
}
HOOK_COLUMNS: Mapping[str, tuple[tuple[str, ...], pa.DataType]] = {"hook": (("hook",), pa.string())}  # JSON text

OPTIONAL = ("scores", "hook")  # fields that a record may lack; their columns are then null


def table_columns(schema: str) -> Mapping[str, tuple[tuple[str, ...], pa.DataType]]:
    """The columns of hv_batch in a table of this schema, in order, without `file_name`."""
    return COLUMNS if schema == DATASET_SCHEMA_1 else {**COLUMNS, **LORA_COLUMN, **SCORE_COLUMNS, **HOOK_COLUMNS}


def seal_shard(
    store: Store,
    shard: int,
    keys_in_order: Sequence[str],
    extra_types: Mapping[str, ColumnType] | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    earlier: Sequence[Mapping[str, Any]] = (),
    schema: str = DATASET_SCHEMA,
    webdataset: bool = False,
) -> bool:
    """Write the shard's `metadata.parquet` from its commit records, and its totals, lineage table and tar.

    Returns True if this call sealed the shard, False if it was sealed before. `keys_in_order` are all keys of the shard
    in plan order; quarantined samples have no row. `extra_types` are the types of the user's columns over the whole
    manifest (`extra_columns.merge_types`); without them, a column has the type of this shard's values, which is correct
    only if the run has one shard. `identity` is that of the run (`run.json`): weights, precision, plan and everything
    else that determines the pixels, for users who receive the table without its output root. `earlier` are its former
    identities. `schema` is that of the run's tables (`dataset_schema`).

    Raises ValueError if a sample is neither committed nor quarantined.
    """
    if is_sealed(store, shard):
        return False
    committed = read_committed(store, shard, keys_in_order)
    return seal_records(
        *(store, shard, committed, extra_types or {}),
        identity=identity or {},
        earlier=earlier,
        schema=schema,
        webdataset=webdataset,
    )


def is_sealed(store: Store, shard: int) -> bool:
    return store.exists(layout.metadata_key(shard))


def read_committed(store: Store, shard: int, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The commit records of a shard in the order of `keys`, which are all its keys.

    Quarantined and withdrawn samples have none. Raises ValueError if a sample is pending.
    """
    withdrawn = withdrawn_keys(store, shard)
    records = store.each(partial(_terminal_record, store, shard), [key for key in keys if key not in withdrawn])
    return [record for record in records if record is not None]


def seal_records(
    store: Store,
    shard: int,
    committed: Sequence[Mapping[str, Any]],
    extra_types: Mapping[str, ColumnType],
    *,
    identity: Mapping[str, Any],
    schema: str,
    webdataset: bool,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> bool:
    """As `seal_shard`, from the commit records that `read_committed` has returned.

    `earlier` are the former identities of the run (`run.json`). If the rows have several fingerprints, the table's
    metadata holds the identity of each as `hv_batch.identities`.
    """
    table = metadata_table(committed, extra_types, schema)
    # These must be written before the seal, so that a sealed shard always has them.
    write_totals(store, shard, add_up(committed))
    store.put(layout.lineage_key(shard), parquet_bytes(lineage_table(committed)))
    if webdataset:
        write_tar(store, shard, table.to_pylist())
    licence = records_licence(committed)
    metadata = {"hv_batch.schema": schema, **_identities(committed, identity, earlier), "hv_batch.licence": licence}
    return store.put_new(layout.metadata_key(shard), parquet_bytes(table.replace_schema_metadata(metadata)))


def _identities(
    committed: Sequence[Mapping[str, Any]], identity: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]
) -> dict[str, bytes]:
    """The identities of the rows, for the table's metadata. `hv_batch.identity` is the newest of them."""
    by_fingerprint = {each["fingerprint"]: each["identity"] for each in earlier}
    by_fingerprint.pop(current := fingerprint(identity), None)  # a run may have gone back to an earlier identity
    by_fingerprint[current] = identity
    named = {record["fingerprint"] for record in committed}
    of_rows = {name: each for name, each in by_fingerprint.items() if name in named} or {current: identity}
    metadata = {"hv_batch.identity": encode(list(of_rows.values())[-1])}
    return metadata | ({"hv_batch.identities": encode(of_rows)} if len(of_rows) > 1 else {})


def read_table(store: Store, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a sealed shard, or only `columns` of it.

    Raises FileNotFoundError if the shard is not sealed, and ValueError if its table cannot be read.
    """
    data = store.get(layout.metadata_key(shard))
    try:
        return read_parquet(data, columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{layout.metadata_key(shard)} is not a Parquet table of hv_batch: {error}") from error


def read_rows(store: Store, shard: int) -> list[dict[str, Any]]:
    """The rows of a sealed shard's table in plan order, with `file_name` and the columns of `COLUMNS`.

    Raises as `read_table`, and ValueError if a column is missing or a row is invalid.
    """
    rows: list[dict[str, Any]] = read_table(store, shard, ["file_name", *COLUMNS]).to_pylist()
    if rows and rows[0].keys() != {"file_name", *COLUMNS}:
        missing = sorted({"file_name", *COLUMNS} - rows[0].keys())
        raise ValueError(f"{layout.metadata_key(shard)} lacks the columns {missing}")
    for number, row in enumerate(rows):
        try:
            check(TableRow, row)
        except ValueError as error:
            raise ValueError(f"{layout.metadata_key(shard)} is damaged: row {number}: {error}") from error
    return rows


def describe_row(record: Mapping[str, Any], schema: str = DATASET_SCHEMA) -> dict[str, Any]:
    """The table row for a commit record, without the user's own columns. A record without scores has null there."""
    row = {"file_name": record["file"].rpartition("/")[2]}
    return row | {name: _value_at(record, path) for name, (path, _) in table_columns(schema).items()}


def _terminal_record(store: Store, shard: int, key: str) -> dict[str, Any] | None:
    """The commit record, or None for a quarantined sample. A commit takes precedence over a quarantine (P1).

    Raises ValueError if the sample has neither record.
    """
    for _ in range(2):  # twice: a late commit may remove the quarantine record between the two requests
        try:
            return read_commit(store, shard, key)
        except FileNotFoundError:
            if store.exists(layout.quarantine_key(shard, key)):
                return None
    raise ValueError(f"{layout.shard_name(shard)} cannot be sealed: sample {key!r} is still pending")


def metadata_table(
    records: Sequence[Mapping[str, Any]], extra_types: Mapping[str, ColumnType], schema: str = DATASET_SCHEMA
) -> pa.Table:
    """One row for each commit record, in the given order: `file_name`, `table_columns`, the user's columns by name."""
    types = dict(extra_types)
    for record in records:
        merge_types(types, record["extra"])
    rows = [describe_row(record, schema) for record in records]
    columns = {"file_name": pa.array([row["file_name"] for row in rows], pa.string())}
    for name, (_, dtype) in table_columns(schema).items():
        columns[name] = pa.array([row[name] for row in rows], dtype)
    for name, column in column_names(types, taken=columns).items():
        columns[column] = arrow_column((record["extra"].get(name) for record in records), types[name])
    return pa.table(columns)


def _value_at(record: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = record
    for name in path:
        value = value.get(name) if path[0] in OPTIONAL or name in OPTIONAL_FIELDS else value[name]
        if value is None:
            return None
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return clean_text(value) if isinstance(value, str) else value


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file. Equal tables give equal bytes with the same version of pyarrow."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        if table.num_rows:  # the Hugging Face loader fails on an empty row group, but not on a file without row groups
            writer.write_table(table)
    return sink.getvalue()
