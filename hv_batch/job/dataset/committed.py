"""Reads the commit records of an output root, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from hv_batch.job import layout
from hv_batch.job.dataset.conditions import Condition, as_record, check_columns, in_table, matches
from hv_batch.job.dataset.seal import read_table, table_columns
from hv_batch.job.documents.reading import InvalidObjectError, check
from hv_batch.job.documents.schema import Scores, TableRow
from hv_batch.job.manifest.index import read_index
from hv_batch.job.manifest.planned_keys import PlannedKeys
from hv_batch.job.quality import SCORES
from hv_batch.job.records.commits import find_shards, read_commit, scan_shard
from hv_batch.job.records.run_document import chosen_shards, dataset_schema
from hv_batch.job.records.withdrawn import all_withdrawn
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

Damaged = Callable[[InvalidObjectError], None]


def committed_records(
    store: Store, planned: PlannedKeys, shards: Iterable[int], damaged: Damaged | None = None
) -> Iterator[dict[str, Any]]:
    """Yields every commit record of `shards` in plan order. The records of one shard are held in memory (P7).

    A damaged record is passed to `damaged` and left out; without `damaged`, its InvalidObjectError is raised.
    """
    for shard in shards:
        keys = scan_shard(store, shard, keys=planned.of(shard)).committed
        records = map_in_threads(partial(_read, store, shard, damaged), keys, store.readers)
        yield from sorted((record for record in records if record), key=itemgetter("row", "video_index"))


def _read(store: Store, shard: int, damaged: Damaged | None, key: str) -> dict[str, Any] | None:
    try:
        return read_commit(store, shard, key)
    except InvalidObjectError as error:
        if damaged is None:
            raise
        damaged(error)
        return None


def matching_records(
    store: Store,
    run: Mapping[str, Any],
    conditions: Sequence[Condition],
    shards: Collection[int] | None = None,
    damaged: Damaged | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the commit records that satisfy all conditions, in plan order, as `committed_records`.

    `run` is the run.json, `shards` are all if None. Of a sealed shard whose table answers the conditions, only the
    records that match are read. Raises UserError if a condition names a column, or `shards` a shard, that the run does
    not have.
    """
    planned = PlannedKeys(store, run)
    further = _further_columns(store)
    if further is not None:
        check_columns(conditions, further)
    schema = dataset_schema(run)
    from_table = in_table(conditions, further or (), has_scores=set(SCORES) <= table_columns(schema).keys())
    withdrawn = all_withdrawn(store)  # the table of a shard may still have their rows after a crash
    for shard in find_shards(store, chosen_shards(run, shards), (layout.COMMITS, layout.MEDIA)):
        keys = _matching_keys(store, shard, conditions) if from_table else None
        if keys is not None:
            of_samples = planned.of(shard)
            gone = withdrawn.get(shard, frozenset())
            known = [key for key in keys if (of_samples is None or key in of_samples) and key not in gone]
            records = map_in_threads(partial(_read, store, shard, damaged), known, store.readers)
            yield from (record for record in records if record)
        else:
            records = committed_records(store, planned, [shard], damaged)
            yield from (record for record in records if matches(record, conditions))


def _matching_keys(store: Store, shard: int, conditions: Sequence[Condition]) -> list[str] | None:
    """The keys of matching samples in a shard's table; None if there is no valid table."""
    try:
        rows = [as_record(row) for row in read_table(store, shard).to_pylist()]
        for row in rows:
            check(TableRow, row["params"])
            if row["scores"]:
                check(Scores, row["scores"])
    except (FileNotFoundError, ValueError):
        return None
    return [row["params"]["key"] for row in rows if matches(row, conditions)]


def _further_columns(store: Store) -> Collection[str] | None:
    try:
        return read_index(store).extra_kinds.keys()
    except (FileNotFoundError, InvalidObjectError):
        return None  # any column may exist
