"""Reads the records of one shard, and makes its part and its digest of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from datetime import datetime
from functools import partial
from operator import itemgetter
from typing import Any

from hv_batch.job.documents.reading import InvalidObjectError
from hv_batch.job.documents.report import DIGEST_SCHEMA, PART_SCHEMA
from hv_batch.job.records.commits import read_commit
from hv_batch.job.records.quarantine import read_failed
from hv_batch.job.records.withdrawn import read_tombstone
from hv_batch.job.report.causes import group_causes
from hv_batch.job.report.facets import count_facets
from hv_batch.job.report.gpus import Gpus
from hv_batch.job.report.json_text import encode_json
from hv_batch.job.report.samples import (
    COMMITTED,
    QUARANTINED,
    WITHDRAWN,
    Sample,
    describe_committed,
    describe_damaged,
    describe_pending,
    describe_quarantined,
    describe_withdrawn,
)
from hv_batch.job.report.shards.listing import ShardListing
from hv_batch.job.report.shards.planned import PlannedSamples
from hv_batch.job.report.shards.sealed import SealedTables
from hv_batch.job.report.spans import find_spans, pack_spans
from hv_batch.job.report.spread import collect_millis
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

Record = Mapping[str, Any]


def digest_shard(
    store: Store, listing: ShardListing, samples: int, planned: PlannedSamples, tables: SealedTables, gpus: Gpus
) -> tuple[bytes, dict[str, Any], list[Sample]]:
    """The part of a shard as bytes, its digest, and the samples of the part. `samples` is the number of its samples."""
    shard = listing.shard
    # Damaged records count in the totals, as in `status`, and `verify` reports them. The part leaves them out.
    committed = tables.records(listing) or _present(
        map_in_threads(partial(_read_commit, store, shard), listing.committed, store.readers)
    )
    failed = _present(map_in_threads(partial(read_failed, store, shard), listing.quarantined, store.readers))
    tombstones = _present(store.each(partial(_read_tombstone, store, shard), sorted(listing.withdrawn)))
    described: list[tuple[Record, Sample]] = [
        *((record, describe_committed(record)) for record in committed),
        *((record, describe_quarantined(record)) for record in failed),
        *((record, describe_withdrawn(record)) for record in tombstones),
    ]
    described += _unread(listing, samples, {record["key"] for record, _ in described}, planned)
    described.sort(key=lambda pair: (pair[0]["row"], pair[0]["video_index"], pair[0]["key"]))
    shown = [sample for _, sample in described]
    part = encode_json({"schema": PART_SCHEMA, "shard": shard, "samples": shown})
    facts = _digest(listing, samples, committed, failed, shown, gpus)
    return part, {**facts, "part_bytes": len(part)}, shown


def empty_digest(listing: ShardListing, samples: int) -> dict[str, Any]:
    """The digest of a shard without any record. It has no part."""
    return {**_digest(listing, samples, [], [], [], Gpus()), "part_bytes": 0}


def _unread(
    listing: ShardListing, samples: int, read: Set[str], planned: PlannedSamples
) -> Iterator[tuple[Record, Sample]]:
    """What the part says of samples without a readable record: pending ones, and damaged commit records."""
    damaged = set(listing.committed - read)
    if not damaged and len(listing.terminal) >= samples:
        return
    for each in planned.of(listing.shard):
        if each["key"] in damaged:
            damaged.remove(each["key"])
            yield each, describe_damaged(each)
        elif each["key"] not in listing.terminal:
            yield each, describe_pending(each)
    for key in damaged:  # the root has no index
        unknown = {"key": key, "id": key, "row": 0, "video_index": 0, "params": {}}
        yield unknown, describe_damaged(unknown)


def _digest(
    listing: ShardListing,
    samples: int,
    committed: Sequence[Record],
    failed: Sequence[Record],
    shown: Sequence[Sample],
    gpus: Gpus,
) -> dict[str, Any]:
    counts = {
        COMMITTED: len(listing.committed),
        QUARANTINED: len(listing.quarantined),
        WITHDRAWN: len(listing.withdrawn),
    }
    times = [(record, at) for record in committed if (at := created_at(record)) is not None]
    stages: dict[str, float] = {}
    for record in committed:
        for stage, seconds in record["stages"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds * gpus.of(stage, record["places"].get(stage, {}))
    fingerprints: dict[str, int] = {}
    for record in committed:
        fingerprints[record["fingerprint"]] = fingerprints.get(record["fingerprint"], 0) + 1
    return {
        "schema": DIGEST_SCHEMA,
        "shard": listing.shard,
        "state": listing.state,
        "sealed": listing.is_sealed,
        "samples": samples,
        **counts,
        "pending": max(0, samples - sum(counts.values())),
        "media_bytes": sum(record["bytes"] for record in committed),
        "frames": sum(record["produced"]["num_frames"] for record in committed),
        "media_seconds": round(sum(map(_duration, committed)), 3),
        "facets": count_facets(shown),
        "causes": group_causes(failed),
        "stage_ms": collect_millis(shown),
        "gpu_seconds": {stage: round(seconds, 3) for stage, seconds in stages.items() if seconds},
        "committed_at": sorted(int(at) for _, at in times),
        "quarantined_at": sorted(int(at) for at in map(created_at, failed) if at is not None),
        "work": pack_spans(find_spans(times, gpus)),
        "fingerprints": fingerprints,
    }


def created_at(record: Record) -> float | None:
    """The unix time of a record; None for a damaged one, or a time before 1970."""
    value = record.get("created_at")
    try:
        at = datetime.fromisoformat(value).timestamp() if isinstance(value, str) else -1.0
    except (ValueError, OverflowError):
        return None
    return at if 0 <= at < 1e11 else None


def _duration(record: Record) -> float:
    frames = record["produced"]["num_frames"]
    return frames / record["fps"] if frames > 1 else 0.0


def _present(records: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    return sorted((record for record in records if record), key=itemgetter("row", "video_index", "key"))


def _read_commit(store: Store, shard: int, key: str) -> dict[str, Any] | None:
    try:
        return read_commit(store, shard, key)
    except (FileNotFoundError, InvalidObjectError):  # removed after the listing, or damaged
        return None


def _read_tombstone(store: Store, shard: int, key: str) -> dict[str, Any] | None:
    try:
        return read_tombstone(store, shard, key)
    except (FileNotFoundError, InvalidObjectError):
        return None
