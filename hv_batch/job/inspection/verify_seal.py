"""What a shard was sealed with, held against its commit records: its table, lineage, sums and tar.

All of it follows from the records, and one seal makes all of it anew, so the first thing that is wrong speaks for the
rest: a record that changed would otherwise be told four times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import pyarrow as pa

from hv_batch.job import layout
from hv_batch.job.dataset.lineage import lineage_table
from hv_batch.job.dataset.seal import COLUMNS, metadata_table, read_table
from hv_batch.job.dataset.shard_totals import add_up, read_sums
from hv_batch.job.dataset.webdataset import check_tar
from hv_batch.job.inspection.findings import Fault, Finding
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.manifest.index import read_index
from hv_batch.job.storage.parquet import read_parquet
from hv_batch.job.storage.store import Store
from hv_batch.job.user_input import shorten

Record = Mapping[str, Any]


def check_sealed(store: Store, shard: int, records: Sequence[Record], run: Mapping[str, Any]) -> list[Finding]:
    """`records` are those of the shard that can be read; the others have been told already. `run` is its run.json."""
    in_order = sorted(records, key=itemgetter("row", "video_index"))
    has_tar = bool(run["config"]["output"].get("webdataset"))
    problem = (
        _table_problem(store, shard, in_order)
        or _lineage_problem(store, shard, in_order)
        or _sums_problem(store, shard, in_order)
        or (_tar_problem(store, shard) if has_tar else None)
    )
    return [Finding(shard, None, *problem)] if problem else []


def _table_problem(store: Store, shard: int, records: Sequence[Record]) -> tuple[Fault, str] | None:
    kinds = _extra_kinds(store)
    ours = None if kinds is not None else ["file_name", *COLUMNS]
    expected = metadata_table(records, kinds or {})
    expected = expected.select(ours) if ours else expected
    try:
        found = read_table(store, shard, ours)
    except ValueError as error:
        return Fault.TABLE, str(error)
    if different := sorted(set(expected.column_names) ^ set(found.column_names)):
        return Fault.TABLE, f"{layout.metadata_key(shard)} lacks, or should not have, the columns {different}"
    told = _differences(found.to_pylist(), expected.to_pylist())
    return (Fault.TABLE, told) if told else None


def _differences(found: Sequence[Record], expected: Sequence[Record]) -> str:
    rows, wanted = {row["key"]: row for row in found}, {row["key"]: row for row in expected}
    details = [
        f"the row of {key} says {name} = {shorten(rows[key][name])}, its record {shorten(value)}"
        for key in wanted.keys() & rows.keys()
        for name, value in wanted[key].items()
        if rows[key][name] != value
    ]
    if absent := sorted(wanted.keys() - rows.keys()):
        details.append(f"{len(absent)} committed samples have no row, as {absent[0]}")
    if foreign := sorted(rows.keys() - wanted.keys()):
        details.append(f"{len(foreign)} rows have no commit record, as {foreign[0]}")
    if not details and [row["key"] for row in found] != list(wanted):
        details.append("its rows are not one a sample in the order of the plan")
    return "; ".join(sorted(details)[:3])


def _extra_kinds(store: Store) -> Mapping[str, ColumnType] | None:
    """Of the manifest's further columns, whose types follow from all of it; None where there is no index to tell."""
    try:
        return read_index(store).extra_kinds
    except (FileNotFoundError, ValueError):
        return None


def _lineage_problem(store: Store, shard: int, records: Sequence[Record]) -> tuple[Fault, str] | None:
    key = layout.lineage_key(shard)
    try:
        found = read_parquet(store.get(key))
    except FileNotFoundError:
        return Fault.LINEAGE, f"{key} is missing"
    except (pa.ArrowException, OSError) as error:
        return Fault.LINEAGE, f"{key} is not a table of this program: {error}"
    return None if found.equals(lineage_table(records)) else (Fault.LINEAGE, f"{key} says other than the records")


def _sums_problem(store: Store, shard: int, records: Sequence[Record]) -> tuple[Fault, str] | None:
    found = read_sums(store, shard)  # without them a summary reads the records
    if found is None or found == add_up(records):
        return None
    return Fault.SUMS, f"{layout.totals_key(shard)} says other than the records"


def _tar_problem(store: Store, shard: int) -> tuple[Fault, str] | None:
    problem = check_tar(store, shard, read_table(store, shard).to_pylist())
    return (Fault.TAR, f"{layout.tar_key(shard)}: {problem}") if problem else None
