"""The sample keys of each shard, from the index in an output root, without the run's config.

They tell records of samples from foreign objects. Reading them costs one request for each part of the index.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from hv_batch.job.documents.reading import InvalidObjectError
from hv_batch.job.manifest.index import IndexPart, IndexRows, read_index, read_part
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

PARTS_HELD = 2  # shards are asked for in order, and a shard may lie in two parts (P7)


class PlannedKeys:
    """`of(shard)` may be called in several threads.

    If the root has no index of this run, or a part of it is damaged, the keys are unknown: `verify` reports damage, and
    callers count every record with a valid name.
    """

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        """`run` is the run.json."""
        self._store = store
        self._shard_size: int = run["config"]["output"]["shard_size"]
        self._samples: int = run["manifest"]["samples"]
        self._parts: Sequence[IndexPart] = ()
        self._starts: list[int] = []  # the number of samples before each part
        self._held: OrderedDict[str, IndexRows] = OrderedDict()
        self._lock = threading.Lock()
        try:
            index = read_index(store)
        except (FileNotFoundError, InvalidObjectError):
            return
        if not belongs_to(index.document, run):
            return
        self._parts = index.parts
        self._starts = [0, *accumulate(part.samples for part in index.parts)][:-1]

    def of(self, shard: int) -> frozenset[str] | None:
        """The keys of all samples of a shard; None if they are unknown."""
        first = shard * self._shard_size
        end = min(first + self._shard_size, self._samples)
        if not self._parts:
            return None
        try:
            with self._lock:
                return frozenset(
                    key
                    for before, part in parts_between(self._parts, self._starts, first, end)
                    for key in self._rows(part).keys(first - before, end - before)
                )
        except (InvalidObjectError, UserError):
            return None

    def _rows(self, part: IndexPart) -> IndexRows:
        if part.name not in self._held:
            self._held[part.name] = IndexRows(part, read_part(self._store, part, ["key", "videos"]))
            while len(self._held) > PARTS_HELD:
                self._held.popitem(last=False)
        return self._held[part.name]


def parts_between(
    parts: Sequence[IndexPart], starts: Sequence[int], first: int, end: int
) -> Iterator[tuple[int, IndexPart]]:
    """The parts that hold any of the samples [first, end), each with the number of samples before it.

    `starts` has that number for every part.
    """
    for at in range(max(0, bisect_right(starts, first) - 1), bisect_left(starts, end)):
        yield starts[at], parts[at]


def belongs_to(index: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether an index document is that of the manifest of a run.json."""
    summary = index["summary"]
    has_digest = summary["digest"] == run["identity"].get("manifest", summary["digest"])
    return has_digest and summary["samples"] == run["manifest"]["samples"]
