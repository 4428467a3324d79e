"""The totals of one shard's committed samples, for the summary of the run.

A sealed shard stores its totals, so the summary of a run of a million samples reads one small object for each shard and
not every commit record. All totals are integers (milliseconds, frames), so their sum does not depend on the order, nor
on whether they come from the records or from stored totals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hv_batch.job import layout
from hv_batch.job.documents.reading import InvalidObjectError, read
from hv_batch.job.documents.schema import TotalsDocument
from hv_batch.job.quality import look
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store

SCHEMA = "hv_batch/sums/1"

_COUNTERS = ("stage_ms", "denoise_ms", "timed", "embeddings", "retries", "frames_by_fps", "looks")


@dataclass(slots=True)
class ShardTotals:
    """Totals over committed samples."""

    committed: int = 0
    bytes: int = 0
    frames: int = 0
    stage_ms: Counter[str] = field(default_factory=Counter)
    denoise_ms: Counter[str] = field(default_factory=Counter)  # by the number of ranks, "" if it is not recorded
    timed: Counter[str] = field(default_factory=Counter)  # samples that report the stage
    # Prompts "encoded" and "recalled"; samples with a "truncated" or "truncated_negative" prompt, and "tokens_lost".
    embeddings: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)  # failed attempts, by class
    frames_by_fps: Counter[str] = field(default_factory=Counter)  # of videos; an image has no duration
    looks: Counter[str] = field(default_factory=Counter)  # of samples that have scores

    def add(self, record: Mapping[str, Any]) -> None:
        """Add one commit record. Its seconds have three decimals, so milliseconds are exact."""
        frames = record["produced"]["num_frames"]
        self.committed += 1
        self.bytes += record["bytes"]
        self.frames += frames
        self.stage_ms.update({stage: round(seconds * 1000) for stage, seconds in record["stages"].items()})
        ranks = record["places"].get("denoise", {}).get("ranks", "")
        self.denoise_ms[str(ranks)] += round(record["stages"].get("denoise", 0.0) * 1000)
        self.timed.update(record["stages"].keys())
        encode_report = record["places"].get("encode", {})
        self.embeddings.update({name: encode_report.get(name, 0) for name in ("encoded", "recalled")})
        lost = {name: encode_report.get(name, 0) for name in ("tokens_lost", "negative_tokens_lost")}
        truncated = {"truncated": lost["tokens_lost"] > 0, "truncated_negative": lost["negative_tokens_lost"] > 0}
        self.embeddings.update({name: int(is_so) for name, is_so in truncated.items()})
        self.embeddings["tokens_lost"] += sum(lost.values())
        self.retries.update(failure["kind"] for failure in record["history"])
        if frames > 1:
            self.frames_by_fps[str(record["fps"])] += frames
        if scores := record.get("scores"):
            self.looks[look(scores, frames)] += 1

    def merge(self, other: ShardTotals) -> None:
        self.committed += other.committed
        self.bytes += other.bytes
        self.frames += other.frames
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))

    @property
    def images(self) -> int:
        return self.frames - sum(self.frames_by_fps.values())

    def footage_seconds(self) -> float:
        """The total duration of the videos."""
        return sum(frames / int(fps) for fps, frames in sorted(self.frames_by_fps.items()))

    def to_dict(self) -> dict[str, Any]:
        numbers = {"committed": self.committed, "bytes": self.bytes, "frames": self.frames}
        counters = {name: dict(getattr(self, name)) for name in _COUNTERS if name != "looks" or self.looks}
        return {"schema": SCHEMA, **numbers, **counters}


def add_up(records: Iterable[Mapping[str, Any]]) -> ShardTotals:
    """The totals over commit records."""
    totals = ShardTotals()
    for record in records:
        totals.add(record)
    return totals


def write_totals(store: Store, shard: int, totals: ShardTotals) -> None:
    store.put(layout.totals_key(shard), encode(totals.to_dict()))


def read_totals(store: Store, shard: int) -> ShardTotals | None:
    """The stored totals of a shard; None if there are none, or if they are damaged or of another version."""
    try:
        values = read(store, layout.totals_key(shard), TotalsDocument)
    except (FileNotFoundError, InvalidObjectError):
        return None
    numbers = {name: value for name, value in values.items() if name != "schema"}
    return ShardTotals(**numbers | {name: Counter(values.get(name, {})) for name in _COUNTERS})
