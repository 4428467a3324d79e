"""Reads a sealed shard from its tables: three requests instead of one for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hv_batch.job import layout
from hv_batch.job.dataset.lineage import read_lineage
from hv_batch.job.dataset.seal import read_table, table_columns
from hv_batch.job.documents.reading import InvalidObjectError, check
from hv_batch.job.documents.report import LineageRow, SealedRow
from hv_batch.job.documents.schema import Scores
from hv_batch.job.manifest.extra_columns import ColumnType, column_names
from hv_batch.job.manifest.index import read_index
from hv_batch.job.quality import SCORES
from hv_batch.job.records.run_document import DATASET_SCHEMA, dataset_schema
from hv_batch.job.report.shards.listing import ShardListing
from hv_batch.job.storage.store import Store


class SealedTables:
    """The tables of a root's sealed shards. `records` may be called in several threads."""

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        """`run` is the run.json."""
        self._store = store
        self._columns: dict[str, str] | None = None  # the manifest's own columns by their names in a table
        if dataset_schema(run) != DATASET_SCHEMA:  # the tables of the first version lack scores
            return
        try:
            kinds = read_index(store).extra_kinds
        except (FileNotFoundError, InvalidObjectError):
            return  # the names of the manifest's own columns are unknown
        taken = ("file_name", *table_columns(DATASET_SCHEMA))
        names = column_names(kinds, taken)
        self._columns = {names[name]: name for name, kind in kinds.items() if kind is not ColumnType.JSON}

    def records(self, listing: ShardListing) -> list[dict[str, Any]] | None:
        """The fields of the shard's commit records that a report reads.

        None if the shard is not sealed, if its tables are damaged, or if they do not describe its records.
        """
        if self._columns is None or not listing.is_sealed:
            return None
        try:
            rows = {row["key"]: row for row in read_table(self._store, listing.shard).to_pylist()}
            lineage = {row["key"]: row for row in read_lineage(self._store, listing.shard)}
            if not rows.keys() == lineage.keys() == listing.committed:
                return None
            posters = self._posters(listing.shard)
            return [self._record(listing.shard, row, lineage[key], posters.get(key)) for key, row in rows.items()]
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # TypeError: a key that cannot be one
            return None

    def _posters(self, shard: int) -> dict[str, str]:
        found = {}
        for path in self._store.list(layout.poster_dir(shard)):
            key = layout.media_owner(path)
            if key and layout.is_poster_of(path, shard, key):
                found[key] = path
        return found

    def _record(
        self, shard: int, row: Mapping[str, Any], lineage: Mapping[str, Any], poster: str | None
    ) -> dict[str, Any]:
        """Raises ValueError if a value is not allowed."""
        check(SealedRow, row)
        check(LineageRow, lineage)
        scores = {name: row[name] for name in SCORES if row.get(name) is not None}
        if scores:
            check(Scores, scores)
        assert self._columns is not None, "records are asked for their columns only if these are known"
        extra = {name: row[column] for column, name in self._columns.items() if row.get(column) is not None}
        return {
            "key": row["key"],
            "id": row["id"],
            "row": row["row"],
            "video_index": row["video_index"],
            "shard": shard,
            "params": row,
            "fps": row["fps"],
            "extra": extra,
            "file": layout.media_dir(shard) + row["file_name"],
            "bytes": row["bytes"],
            "poster": poster,
            "produced": {name: row[name] for name in ("num_frames", "height", "width")},
            "scores": scores or None,
            "stages": lineage["stages"],
            "places": lineage["places"],
            "fingerprint": row["fingerprint"],
            "created_at": lineage["committed_at"],
        }
