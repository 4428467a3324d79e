"""What an export reads: the tables of sealed shards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

from hv_batch.job import layout
from hv_batch.job.dataset.seal import read_rows, read_table
from hv_batch.job.export.destination import ExportedFile
from hv_batch.job.formatting import plural
from hv_batch.job.records.commits import find_shards
from hv_batch.job.records.run_document import chosen_shards
from hv_batch.job.records.withdrawn import all_withdrawn
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError


def sealed_shards(store: Store, run: Mapping[str, Any], shards: Collection[int] | None) -> Sequence[int]:
    """The shards to export: all of the run, or `shards`. Raises UserError if one of them is not sealed."""
    chosen = chosen_shards(run, shards)
    found = find_shards(store, chosen, [layout.MEDIA])
    is_sealed = store.each(lambda shard: store.exists(layout.metadata_key(shard)), found)
    sealed = dict.fromkeys(compress(found, is_sealed))
    if still_open := len(chosen) - len(sealed):
        example = next(shard for shard in chosen if shard not in sealed)
        raise UserError(
            f"Not sealed yet: {plural(still_open, 'shard')} of {public_url(store.url)}, for example "
            f"{layout.shard_name(example)}. The export would lack their videos. Finish the run with `hv-batch "
            "resume`, or name sealed shards with --shards; `hv-batch status` lists them."
        )
    return chosen


def media_rows(store: Store, shards: Sequence[int], *columns: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(shard, row) of every media file in plan order: the columns of hv_batch, and of the manifest those in `columns`.

    Raises UserError if a table cannot be read, or if it has the row of a sample that was withdrawn.
    """
    withdrawn = all_withdrawn(store)
    for shard in shards:
        try:
            rows = read_rows(store, shard)
            extra = read_table(store, shard, list(columns)).to_pylist() if columns else [{}] * len(rows)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{error}. Run `hv-batch verify --repair`, and export again.") from error
        if gone := withdrawn.get(shard, frozenset()).intersection(row["key"] for row in rows):
            raise UserError(
                f"The withdrawal of sample {min(gone)} from {public_url(store.url)} was interrupted, and "
                f"{layout.metadata_key(shard)} still has its row. Run the same `hv-batch withdraw` command again, and "
                "then export."
            )
        yield from ((shard, row | more) for row, more in zip(rows, extra, strict=True))


def count_rows(store: Store, shards: Sequence[int]) -> list[int]:
    """The number of rows of each shard."""
    return store.each(partial(_count, store), shards)


def media_file(shard: int, row: Mapping[str, Any], name: str) -> ExportedFile:
    """The media file of a row, under `name` in the export."""
    return ExportedFile(layout.media_dir(shard) + row["file_name"], name, row["bytes"], row["sha256"])


def _count(store: Store, shard: int) -> int:
    try:
        return int(read_table(store, shard, ["key"]).num_rows)
    except ValueError as error:
        raise UserError(f"{error}. Run `hv-batch verify --repair`, and export again.") from error
