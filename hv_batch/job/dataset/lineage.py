"""How a shard's videos came to be, as a second table: what differs from one undisturbed run to the next.

It is kept apart from `metadata.parquet`, which must not depend on how the night went (P3), and out of the dataset's
folder, where loaders would take it for data. The commit records hold the same and more; this is for whoever joins
costs or machines to samples without reading a million small files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from hv_batch.job.records.commits import LICENCE_ID

SCHEMA = "hv_batch/lineage/1"

COLUMNS: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "committed_at": pa.string(),  # ISO 8601, UTC
    "attempts": pa.int64(),  # tries, the last one included
    "failures": pa.string(),  # JSON: the classes of the tries that failed, in order
    "stages": pa.string(),  # JSON: seconds by stage
    "places": pa.string(),  # JSON: node, worker and further facts by stage
    "versions": pa.string(),  # JSON: of the packages that rendered it
}


def lineage_table(records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One row a commit record, in the order given."""
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
    return pa.table(columns).replace_schema_metadata({"hv_batch.schema": SCHEMA, "hv_batch.licence": LICENCE_ID})
