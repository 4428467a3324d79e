"""Repeated rows without id: number them, or drop them.

The key of such a row is a hash of its content, so equal rows have equal keys. The first keeps its key, and the others
get it with their occurrence: `7e6ef1b4572139a2`, `7e6ef1b4572139a2-2`, `7e6ef1b4572139a2-3`. So a line that is inserted
elsewhere changes no key.

Memory: 24 bytes for each key that occurs more than once (P7).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.formatting import plural
from hv_batch.job.manifest.index import IndexWriter
from hv_batch.job.manifest.row_validation import PART_SCHEMA, encode_part, hash_key
from hv_batch.job.manifest.samples import sample_keys

Hashes = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(slots=True)
class Repeats:
    """The repeated rows of a manifest that were numbered or dropped."""

    numbered: int = 0
    dropped: int = 0
    first_row: int = 0  # of them, numbered over all files
    dropped_shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    unresolved: Hashes = field(default_factory=lambda: np.empty(0, np.int64))  # of keys that are still not unique

    def note(self, first: str) -> str:
        """What was done, for the plan. `first` is the place of `first_row`."""
        if self.dropped:
            return f"{plural(self.dropped, 'row')} without id dropped, because an earlier row is equal: {first} first"
        return (
            f"{plural(self.numbered, 'row')} without id numbered, because an earlier row is equal: {first} first. "
            "Each is rendered with an id and a seed of its own; --duplicates drop renders only the first of equal "
            "rows, --duplicates refuse reports them"
        )


def resolve_repeats(writer: IndexWriter, hashes: Hashes, config: RunConfig) -> Repeats:
    """Number or drop the repeated rows in the parts of the index, as `manifest.duplicates` says.

    `hashes` are those of all sample keys, sorted. A repeated row that gives its seed is left, because another number
    would not make another video of it.
    """
    keys, counts = np.unique(hashes[np.isin(hashes, hashes[1:][hashes[1:] == hashes[:-1]])], return_counts=True)
    resolver = _Resolver(hashes, keys, counts.astype(np.int32), config)
    for number in range(len(writer.parts)):
        table = writer.read(number, ["key", "videos"])
        firsts = map(_first_key, table["key"].to_pylist(), table["videos"].to_pylist())
        repeated = np.isin(np.array([_hash(key) for key in firsts], np.int64), keys)
        if repeated.any():
            part = resolver.resolve(writer.read(number), repeated)
            if part is not None:
                writer.replace(number, encode_part(part), part.num_rows, int(np.sum(part["videos"].to_numpy())))
    return resolver.finish()


class _Resolver:
    def __init__(self, hashes: Hashes, keys: Hashes, counts: np.ndarray[Any, Any], config: RunConfig) -> None:
        self.repeats = Repeats()
        self._hashes = hashes
        self._keys = keys
        self._left = counts  # samples that still have each of the keys
        self._seen = np.zeros(len(keys), np.int32)  # rows without id so far, at the key of their first video
        self._exact = np.zeros(len(keys), np.uint64)  # the key of the first of them, because hashes may be equal
        self._drops = config.manifest.duplicates == "drop"
        self._defaults = config.defaults.model_dump()
        self._clashes: list[int] = []

    def resolve(self, table: pa.Table, repeated: np.ndarray[Any, Any]) -> pa.Table | None:
        """The table with other keys or without some rows; None if nothing changes."""
        rows: list[dict[str, Any]] = table.to_pylist()
        keys: list[str] = [row["key"] for row in rows]
        kept = np.ones(len(keys), bool)
        changed = False
        for at in np.flatnonzero(repeated).tolist():
            row = rows[at]
            if row["id"] is not None or not self._is_repeat(row):
                continue
            values = json.loads(row["content"])[0]
            if not self._drops and "seed" in values:
                continue
            changed = True
            self._take(row)
            if self._drops:
                kept[at] = False
                shape = [values.get(name, self._defaults[name]) for name in ("height", "width", "num_frames")]
                if all(isinstance(side, int) for side in shape):  # else the row has a problem, and there is no run
                    self.repeats.dropped_shapes[shape[0], shape[1], shape[2]] += row["videos"]
            else:
                keys[at] = f"{keys[at]}-{self._seen[self._at(_first_key(row['key'], row['videos']))]}"
                self._note_new(keys[at], row["videos"])
        if not changed:
            return None
        return table.set_column(1, PART_SCHEMA.field("key"), pa.array(keys, pa.string())).filter(pa.array(kept))

    def finish(self) -> Repeats:
        self.repeats.unresolved = np.concatenate(
            [np.repeat(self._keys, np.maximum(self._left - 1, 0)), np.array(self._clashes, np.int64)]
        )
        return self.repeats

    def _is_repeat(self, row: dict[str, Any]) -> bool:
        at, exact = self._at(_first_key(row["key"], row["videos"])), int(row["key"], 16)
        if self._seen[at] == 0:
            self._exact[at] = exact
        elif self._exact[at] != exact:
            return False
        self._seen[at] += 1
        return bool(self._seen[at] > 1)

    def _take(self, row: dict[str, Any]) -> None:
        """Count a row that gives up its keys."""
        for key in sample_keys(row["key"], row["videos"]):
            self._left[self._at(key)] -= 1
        self.repeats.dropped += self._drops
        self.repeats.numbered += not self._drops
        self.repeats.first_row = self.repeats.first_row or row["row"]

    def _note_new(self, row_key: str, videos: int) -> None:
        """Compare the keys of a numbered row with those of the manifest, where an id may be equal."""
        for key in sample_keys(row_key, videos):
            at = np.searchsorted(self._hashes, _hash(key))
            if at < len(self._hashes) and self._hashes[at] == _hash(key):
                self._clashes.append(_hash(key))

    def _at(self, key: str) -> int:
        return int(np.searchsorted(self._keys, _hash(key)))


def _first_key(row_key: str, videos: int) -> str:
    return next(sample_keys(row_key, videos))


def _hash(key: str) -> int:
    return int.from_bytes(hash_key(key), "little", signed=True)
