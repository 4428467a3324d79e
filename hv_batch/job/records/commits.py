"""The records that end a sample: committed or quarantined, exactly one of them (P1).

Rendering is at-least-once; two workers may finish the same sample after a lost message. Committing is exactly-once: the
media goes first, under a name that holds the hash of its bytes, then the commit record is put if absent. Whoever comes
second finds a record there and changes nothing.

A quarantine record has no standing beside a commit record. Each writer looks for the other kind *after* its own write,
so whatever the order, at least one of the two sees both and removes the quarantine record. A crash between the two
steps can leave both behind; `scan_shard` then counts the sample as committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from hv_batch.job import layout
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.canonical_json import decode, encode, encode_line
from hv_batch.protocol import UserError

if TYPE_CHECKING:
    from hv_batch.job.manifest.samples import Sample
    from hv_batch.job.storage.store import Store

COMMIT_SCHEMA = "hv_batch/commit/1"
QUARANTINE_SCHEMA = "hv_batch/quarantine/1"

COMMIT_FIELDS = frozenset(
    {"schema", "key", "id", "row", "video_index", "shard", "params", "fps", "extra", "file", "sha256", "bytes"}
    | {"poster", "frames_sha256", "produced", "stages", "places", "attempts", "history", "versions", "fingerprint"}
    | {"licence", "created_at"}
)

LICENCE_ID = "tencent-hunyuan-community"  # of every rendered file; `runs.licence_notice` says what it means


class Media(Protocol):
    """What is recorded of a rendered file."""

    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...  # of the file, hex
    @property
    def frames_sha256(self) -> str: ...  # of the uint8 frames before they were compressed, hex
    @property
    def num_frames(self) -> int: ...  # as produced, like the two sides in pixels
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ShardState:
    """What storage knows of one shard, by sample key."""

    committed: frozenset[str]
    quarantined: frozenset[str]  # never holds a committed key (P1)
    latents: frozenset[str]  # final latents that wait for their decode
    sealed: bool


def commit_record(
    sample: Sample,
    *,
    file: str,
    media: Media,
    stages: Mapping[str, Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
    fingerprint: str,
    versions: Mapping[str, Any],
    poster: str | None = None,
) -> dict[str, Any]:
    """The record that makes `sample` done. `file` is the media's key in the output root, `poster` that of its first
    frame.

    `stages` are reports by stage name: their "seconds" become the record's `stages`, all else (node, worker, ...) its
    `places`. `failures` are the tries that failed before this one, `fingerprint` is the run's.
    """
    return {
        "schema": COMMIT_SCHEMA,
        **_describe(sample),
        "file": file,
        "sha256": media.sha256,
        "bytes": media.bytes,
        "poster": poster,
        "frames_sha256": media.frames_sha256,
        "produced": {"num_frames": media.num_frames, "height": media.height, "width": media.width},
        "stages": {name: report["seconds"] for name, report in stages.items()},
        "places": {name: {k: v for k, v in report.items() if k != "seconds"} for name, report in stages.items()},
        "attempts": len(failures) + 1,
        "history": [dict(failure) for failure in failures],
        "versions": dict(versions),
        "fingerprint": fingerprint,
        "licence": LICENCE_ID,
        "created_at": _now(),
    }


def quarantine_record(
    sample: Sample, *, failures: Sequence[Mapping[str, Any]], fingerprint: str, versions: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of a sample that is given up (P5). The last of `failures` (`Failure.to_dict`) used up its budget."""
    last = failures[-1]
    return {
        "schema": QUARANTINE_SCHEMA,
        **_describe(sample),
        "class": last["kind"],
        "message": last["message"],
        "traceback": last["traceback"],
        "attempts": len(failures),
        "history": [dict(failure) for failure in failures],
        "versions": dict(versions),
        "fingerprint": fingerprint,
        "created_at": _now(),
    }


def dated(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as one of this moment: a commit may come long after the video was made."""
    return {**record, "created_at": _now()}


def commit(store: Store, record: Mapping[str, Any]) -> bool:
    """Make the record's sample done; the media must be stored already.

    True when the commit record of this sample is now `record`, False when another one was there first.
    """
    return commit_all(store, [record])[0]


def commit_all(store: Store, records: Sequence[Mapping[str, Any]]) -> list[bool]:
    """As `commit`, of each record."""
    objects = {layout.commit_key(record["shard"], record["key"]): encode_line(record) for record in records}
    created = dict(zip(objects, store.put_new_all(objects), strict=True))

    def is_ours(record: Mapping[str, Any]) -> bool:
        target = layout.commit_key(record["shard"], record["key"])
        # A put whose acknowledgement was lost is repeated and then finds itself: that record is ours all the same.
        is_ours = created[target] or store.get(target) == objects[target]
        quarantined = layout.quarantine_key(record["shard"], record["key"])
        if store.exists(quarantined):  # looking first spares versioned buckets a delete marker for every sample
            store.delete(quarantined)
        return is_ours

    return store.each(is_ours, records)


def quarantine(store: Store, record: Mapping[str, Any]) -> bool:
    """Give the record's sample up. True when it is quarantined now, False when it is committed."""
    shard, key = record["shard"], record["key"]
    committed, target = layout.commit_key(shard, key), layout.quarantine_key(shard, key)
    if store.exists(committed):
        return False
    store.put_new(target, encode(record))
    if store.exists(committed):
        store.delete(target)
        return False
    return True


class DamagedRecordError(UserError, ValueError):
    """What lies in the place of a record was not written by this program."""


def read_commit(store: Store, shard: int, key: str) -> dict[str, Any]:
    """Raises FileNotFoundError, and DamagedRecordError for what lacks something that a commit record has."""
    name = layout.commit_key(shard, key)
    try:
        record = decode(store.get(name))
        missing = ", ".join(sorted(COMMIT_FIELDS - record.keys()))
    except (ValueError, AttributeError) as error:
        missing = f"it is no JSON object: {error}"
    if missing:
        raise DamagedRecordError(
            f"{name} in {public_url(store.url)} is damaged ({missing}). `hv-batch verify` tells what else is, and with "
            "--repair renders it again."
        )
    return record


def read_quarantine(store: Store, shard: int, key: str) -> dict[str, Any]:
    """Raises FileNotFoundError."""
    return decode(store.get(layout.quarantine_key(shard, key)))


def scan_shard(store: Store, shard: int, *, sealed: bool | None = None) -> ShardState:
    """Everything a resume must know about one shard: three listings, whatever its size. `sealed` where it is known."""
    committed, quarantined, latents = (
        layout.sample_keys(store.list(folder))
        for folder in (layout.commit_dir(shard), layout.quarantine_dir(shard), layout.latent_dir(shard))
    )
    if sealed is None:
        sealed = store.exists(layout.metadata_key(shard))
    return ShardState(committed, quarantined - committed, latents, sealed)


def _describe(sample: Sample) -> dict[str, Any]:
    return {
        "key": sample.key,
        "id": sample.id,
        "row": sample.row,
        "video_index": sample.video_index,
        "shard": sample.shard,
        "params": sample.params.to_dict(),
        "fps": sample.fps,
        "extra": dict(sample.extra),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
