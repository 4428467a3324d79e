"""Finds committed samples whose files are not in the output root, before their shard is sealed.

A store may lose an object that it has confirmed, or an operator may delete one. A sealed shard promises all files of
its table, so the commit records of such samples are removed: the samples are pending again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hv_batch.job import layout
from hv_batch.job.storage.store import Store

logger = logging.getLogger(__name__)


def release_lost(store: Store, shard: int, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Remove each of the shard's commit records `records` whose media or poster is missing or has another size.

    One listing of the media shows them; each is then asked for by its name, because a listing may be outdated. Returns
    the keys of the samples.
    """
    sizes = store.list_sizes(layout.media_dir(shard))
    if any(record["poster"] for record in records):
        sizes |= store.list_sizes(layout.poster_dir(shard))
    lost = []
    for record in records:
        problems = [problem for problem in _problems(record, sizes) if _is_lost(store, *problem)]
        if problems:
            name, _ = problems[0]
            logger.warning(
                f"{name} is not in the output root as it was written; the commit record of sample {record['key']} is "
                "removed, and the sample is rendered again",
                extra={"sample": record["key"]},
            )
            store.delete(layout.commit_key(shard, record["key"]))
            lost.append(str(record["key"]))
    return tuple(lost)


def _problems(record: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """The files of a sample that a listing does not show as recorded, with the recorded size (None for a poster)."""
    if sizes.get(record["file"]) != record["bytes"]:
        yield record["file"], record["bytes"]
    if record["poster"] and record["poster"] not in sizes:
        yield record["poster"], None


def _is_lost(store: Store, name: str, num_bytes: int | None) -> bool:
    try:
        size = store.size(name)
    except FileNotFoundError:
        return True
    return num_bytes is not None and size != num_bytes
