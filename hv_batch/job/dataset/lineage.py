"""The lineage table of a shard: how its videos were rendered (attempts, times, places, versions).

These values differ from run to run, so they are not in `metadata.parquet`, whose bytes must not depend on them (P3).
The table is outside the folder of the dataset, because loaders would read it as data. The commit records hold the same
facts and more; the table saves reading a million small files to join costs or machines to samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from hv_batch.job import layout
from hv_batch.job.licences import records_licence
from hv_batch.job.storage.canonical_json import decode_value
from hv_batch.job.storage.parquet import read_parquet
from hv_batch.job.storage.store import Store

SCHEMA = "hv_batch/lineage/1"

COLUMNS: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "committed_at": pa.string(),  # ISO 8601, UTC
    "attempts": pa.int64(),  # including the successful one
    "failures": pa.string(),  # JSON: the classes of the failed attempts, in order
    "stages": pa.string(),  # JSON: seconds by stage
    "places": pa.string(),  # JSON: node, worker and further facts by stage
    "versions": pa.string(),  # JSON: of the packages that rendered it
}

JSON_COLUMNS = ("failures", "stages", "places", "versions")


def read_lineage(store: Store, shard: int) -> list[dict[str, Any]]:
    """The rows of the lineage table of a sealed shard, with the values of their JSON texts.

    Raises FileNotFoundError, and ValueError if the table cannot be read. Whoever uses the values must check them.
    """
    data = store.get(layout.lineage_key(shard))
    try:
        rows = read_parquet(data, list(COLUMNS)).to_pylist()
        return [{**row, **{name: decode_value(row[name].encode()) for name in JSON_COLUMNS}} for row in rows]
    except (pa.ArrowException, OSError, AttributeError, KeyError) as error:
        raise ValueError(f"{layout.lineage_key(shard)} is not a lineage table of hv_batch: {error}") from error


def lineage_table(records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One row for each commit record, in the given order."""
    rows = [
        {
            "key": record["key"],
            "committed_at": record["created_at"],
            "attempts": record["attempts"],
            "failures": json.dumps([failure["kind"] for failure in record["history"]]),
            "stages": json.dumps(record["stages"], sort_keys=True),
            "places": json.dumps(record["places"], sort_keys=True),
            "versions": json.dumps(record["versions"], sort_keys=True),
        }
        for record in records
    ]
    columns = {name: pa.array([row[name] for row in rows], dtype) for name, dtype in COLUMNS.items()}
    metadata = {"hv_batch.schema": SCHEMA, "hv_batch.licence": records_licence(records)}
    return pa.table(columns).replace_schema_metadata(metadata)
