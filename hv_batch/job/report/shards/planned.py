"""The samples of the plan, from the index in an output root, without the run's config: what pending samples will be."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from hv_batch.job.config.field_rules import MAX_VIDEOS
from hv_batch.job.documents.reading import InvalidObjectError
from hv_batch.job.manifest.index import IndexPart, IndexRows, read_index, read_part
from hv_batch.job.manifest.planned_keys import belongs_to, parts_between
from hv_batch.job.manifest.samples import derive_seed, sample_keys
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError


class PlannedSamples:
    """`of(shard)` may be called in several threads. One part of the index is held (P7)."""

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        """`run` is the run.json."""
        self._store = store
        self._shard_size: int = run["config"]["output"]["shard_size"]
        self._samples: int = run["manifest"]["samples"]
        self._seed: int = run["config"].get("seed", 0)
        defaults = run["config"].get("defaults")
        self._defaults = {
            name: value for name, value in (defaults if isinstance(defaults, dict) else {}).items() if _is_plain(value)
        }
        self._held: tuple[str, IndexRows] | None = None
        self._lock = threading.Lock()
        try:
            index = read_index(store)
        except (FileNotFoundError, InvalidObjectError):
            self._parts: tuple[IndexPart, ...] = ()
        else:
            self._parts = index.parts if belongs_to(index.document, run) else ()
        self._starts = [0, *accumulate(part.samples for part in self._parts)][:-1]

    def of(self, shard: int) -> list[dict[str, Any]]:
        """The samples of a shard in plan order, each with the fields of a record that the plan determines.

        Empty if the root has no index of this run, or a damaged one.
        """
        first = shard * self._shard_size
        end = min(first + self._shard_size, self._samples)
        found: list[dict[str, Any]] = []
        try:
            for before, part in parts_between(self._parts, self._starts, first, end):
                found += self._of_part(part, first - before, end - before)
        except (InvalidObjectError, UserError):
            return []
        return found

    def _of_part(self, part: IndexPart, first: int, end: int) -> Iterator[dict[str, Any]]:
        for before, row in self._rows(part).between(first, end):
            values = {**self._defaults, **row.values}
            videos, fps = _videos(values.get("num_videos")), values.get("fps")
            seed = values["seed"] if "seed" in row.values else derive_seed(self._seed, row.key)
            for index, key in enumerate(sample_keys(row.key, videos)):
                if first <= before + index < end:
                    params = {**values, "seed": seed + index}
                    place = {"key": key, "id": row.id or row.key, "row": row.number, "video_index": index}
                    yield {**place, "params": params, "fps": fps, "extra": row.extra}

    def _rows(self, part: IndexPart) -> IndexRows:
        with self._lock:
            if self._held is None or self._held[0] != part.name:
                self._held = (part.name, IndexRows(part, read_part(self._store, part)))
            return self._held[1]


def _videos(value: Any) -> int:
    return value if isinstance(value, int) and 1 <= value <= MAX_VIDEOS else 1


def _is_plain(value: Any) -> bool:
    """Whether a default of run.json, which no schema checks, can be shown."""
    return value is None or isinstance(value, str | bool) or (isinstance(value, int | float) and abs(value) < 2**53)
