"""Compares the files of a sealed shard with its commit records: the table, the lineage, the totals and the tar.

All of them are derived from the records, and one new seal writes all of them again. Only the first problem of a shard
is therefore reported; a changed record would otherwise be reported four times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import pyarrow as pa

from hv_batch.job import layout
from hv_batch.job.dataset.lineage import lineage_table
from hv_batch.job.dataset.seal import metadata_table, read_table, table_columns
from hv_batch.job.dataset.shard_totals import add_up, read_totals
from hv_batch.job.dataset.webdataset import check_tar
from hv_batch.job.documents.reading import InvalidObjectError, read
from hv_batch.job.documents.schema import TotalsDocument
from hv_batch.job.inspection.findings import Fault, Finding, examine, object_finding
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.manifest.index import read_index
from hv_batch.job.records.run_document import dataset_schema
from hv_batch.job.storage.parquet import read_parquet
from hv_batch.job.storage.store import Store
from hv_batch.job.user_input import shorten

Record = Mapping[str, Any]


def check_sealed(store: Store, shard: int, records: Sequence[Record], run: Mapping[str, Any]) -> list[Finding]:
    """The first problem of a sealed shard, or an empty list.

    `records` are the readable commit records of the shard; the caller reports the others. `run` is the run.json.
    """
    in_order = sorted(records, key=itemgetter("row", "video_index"))
    checks = {
        layout.metadata_key(shard): lambda: _table_problem(store, shard, in_order, dataset_schema(run)),
        layout.lineage_key(shard): lambda: _lineage_problem(store, shard, in_order),
        layout.totals_key(shard): lambda: _totals_problem(store, shard, in_order),
    }
    if run["config"]["output"].get("webdataset"):
        checks[layout.tar_key(shard)] = lambda: _tar_problem(store, shard)
    for key, check in checks.items():
        problem = examine(store, key, check)
        if isinstance(problem, InvalidObjectError):
            return [object_finding(problem, Fault.UNREADABLE, shard)]
        if problem:
            return [Finding(shard, None, *problem)]
    return []


def _table_problem(store: Store, shard: int, records: Sequence[Record], schema: str) -> tuple[Fault, str] | None:
    types = _extra_types(store)
    columns = None if types is not None else ["file_name", *table_columns(schema)]
    expected = metadata_table(records, types or {}, schema)
    expected = expected.select(columns) if columns else expected
    try:
        stored = read_table(store, shard, columns)
    except ValueError as error:
        return Fault.TABLE, str(error)
    if different := sorted(set(expected.column_names) ^ set(stored.column_names)):
        return Fault.TABLE, f"the columns {different} of {layout.metadata_key(shard)} are missing or unexpected"
    details = _differences(stored.to_pylist(), expected.to_pylist())
    return (Fault.TABLE, details) if details else None


def _differences(stored: Sequence[Record], expected: Sequence[Record]) -> str:
    rows, expected_rows = {row["key"]: row for row in stored}, {row["key"]: row for row in expected}
    details = [
        f"the row of {key} has {name} = {shorten(rows[key][name])}, its record has {shorten(value)}"
        for key in expected_rows.keys() & rows.keys()
        for name, value in expected_rows[key].items()
        if rows[key][name] != value
    ]
    if missing := sorted(expected_rows.keys() - rows.keys()):
        details.append(f"{len(missing)} committed samples have no row, for example {missing[0]}")
    if unexpected := sorted(rows.keys() - expected_rows.keys()):
        details.append(f"{len(unexpected)} rows have no commit record, for example {unexpected[0]}")
    if not details and [row["key"] for row in stored] != list(expected_rows):
        details.append("its rows are duplicated or not in plan order")
    return "; ".join(sorted(details)[:3])


def _extra_types(store: Store) -> Mapping[str, ColumnType] | None:
    """The types of the user's columns, which depend on the whole manifest; None if there is no valid index."""
    try:
        return read_index(store).extra_kinds
    except (FileNotFoundError, ValueError):
        return None


def _lineage_problem(store: Store, shard: int, records: Sequence[Record]) -> tuple[Fault, str] | None:
    key = layout.lineage_key(shard)
    try:
        stored = read_parquet(store.get(key))
    except FileNotFoundError:
        return Fault.LINEAGE, f"{key} is missing"
    except pa.ArrowException as error:
        return Fault.LINEAGE, f"{key} is not a Parquet table of hv_batch: {error}"
    return None if stored.equals(lineage_table(records)) else (Fault.LINEAGE, f"{key} differs from the records")


def _totals_problem(store: Store, shard: int, records: Sequence[Record]) -> tuple[Fault, str] | None:
    key = layout.totals_key(shard)
    try:
        read(store, key, TotalsDocument)
    except FileNotFoundError:  # no problem: the summary then reads the records
        return None
    except InvalidObjectError as error:
        if not error.is_readable:
            raise
        return Fault.SUMS, f"{key}: {error.problem}"
    return None if read_totals(store, shard) == add_up(records) else (Fault.SUMS, f"{key} differs from the records")


def _tar_problem(store: Store, shard: int) -> tuple[Fault, str] | None:
    problem = check_tar(store, shard, read_table(store, shard).to_pylist())
    return (Fault.TAR, f"{layout.tar_key(shard)}: {problem}") if problem else None
