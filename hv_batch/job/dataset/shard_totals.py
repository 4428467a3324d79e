"""What one shard's committed samples add to the run's summary.

A sealed shard keeps its sums beside it, so that the summary of a run of a million samples reads one small object a
shard instead of every record once more. They hold whole numbers only (milliseconds, frames): adding them up gives the
same summary whether they come from the records, from the shards' sums or from both, and in whatever order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hv_batch.job import layout
from hv_batch.job.storage.canonical_json import decode, encode
from hv_batch.job.storage.store import Store

SCHEMA = "hv_batch/sums/1"

_COUNTERS = ("stage_ms", "denoise_ms", "timed", "embeddings", "retries", "frames_by_fps")


@dataclass(slots=True)
class ShardTotals:
    """Totals over committed samples."""

    committed: int = 0
    bytes: int = 0
    frames: int = 0
    stage_ms: Counter[str] = field(default_factory=Counter)
    denoise_ms: Counter[str] = field(default_factory=Counter)  # by the ranks of a group, "" where not told
    timed: Counter[str] = field(default_factory=Counter)  # samples that report the stage
    embeddings: Counter[str] = field(default_factory=Counter)  # prompts "encoded" and "recalled"
    retries: Counter[str] = field(default_factory=Counter)  # failed tries, by class
    frames_by_fps: Counter[str] = field(default_factory=Counter)  # of videos: an image lasts no time

    def add(self, record: Mapping[str, Any]) -> None:
        """One commit record. Its seconds have three digits after the point, so milliseconds lose nothing."""
        frames = record["produced"]["num_frames"]
        self.committed += 1
        self.bytes += record["bytes"]
        self.frames += frames
        self.stage_ms.update({stage: round(seconds * 1000) for stage, seconds in record["stages"].items()})
        ranks = record["places"].get("denoise", {}).get("ranks", "")
        self.denoise_ms[str(ranks)] += round(record["stages"].get("denoise", 0.0) * 1000)
        self.timed.update(record["stages"].keys())
        at_encode = record["places"].get("encode", {})
        self.embeddings.update({name: at_encode.get(name, 0) for name in ("encoded", "recalled")})
        self.retries.update(failure["kind"] for failure in record["history"])
        if frames > 1:
            self.frames_by_fps[str(record["fps"])] += frames

    def merge(self, other: ShardTotals) -> None:
        self.committed += other.committed
        self.bytes += other.bytes
        self.frames += other.frames
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))

    def footage_seconds(self) -> float:
        return sum(frames / int(fps) for fps, frames in sorted(self.frames_by_fps.items()))

    def to_dict(self) -> dict[str, Any]:
        numbers = {"committed": self.committed, "bytes": self.bytes, "frames": self.frames}
        return {"schema": SCHEMA, **numbers, **{name: dict(getattr(self, name)) for name in _COUNTERS}}


def add_up(records: Iterable[Mapping[str, Any]]) -> ShardTotals:
    sums = ShardTotals()
    for record in records:
        sums.add(record)
    return sums


def write_sums(store: Store, shard: int, sums: ShardTotals) -> None:
    store.put(layout.totals_key(shard), encode(sums.to_dict()))


def read_sums(store: Store, shard: int) -> ShardTotals | None:
    """What `write_sums` kept; None when there is nothing, or nothing that this version understands."""
    try:
        values = decode(store.get(layout.totals_key(shard)))
        if values.pop("schema") != SCHEMA:
            return None
        return ShardTotals(**values | {name: Counter(values[name]) for name in _COUNTERS})
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
