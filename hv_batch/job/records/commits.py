"""The terminal records of samples: a commit record or a quarantine record, exactly one for each sample (P1).

A sample that was withdrawn (`hv_batch.job.records.withdrawn`) has a tombstone instead, and neither of them.

Rendering is at-least-once: two workers may finish the same sample after a lost message. Committing is exactly-once. A
worker first stores the media, under a name that holds the hash of its bytes, and then puts the commit record if it is
absent. A second worker finds the record and changes nothing.

A commit record takes precedence over a quarantine record. Each writer checks for the other kind *after* its own write,
so in any order at least one of the two writers sees both records and removes the quarantine record. A crash between the
two steps can leave both; `scan_shard` then counts the sample as committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from hv_batch.job import layout
from hv_batch.job.documents.reading import read_record
from hv_batch.job.documents.schema import CommitRecord, QuarantineRecord
from hv_batch.job.licences import TENCENT
from hv_batch.job.records.withdrawn import delete_remnants, is_withdrawn, withdrawn_keys
from hv_batch.job.storage.canonical_json import encode, encode_line

if TYPE_CHECKING:
    from hv_batch.job.manifest.samples import Sample
    from hv_batch.job.storage.store import Store

COMMIT_SCHEMA = "hv_batch/commit/1"
QUARANTINE_SCHEMA = "hv_batch/quarantine/1"


class Media(Protocol):
    """The facts about a rendered file that its commit record holds."""

    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...  # of the file, hex
    @property
    def frames_sha256(self) -> str: ...  # of the uint8 frames before compression, hex
    @property
    def num_frames(self) -> int: ...  # as produced, like height and width (pixels)
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ShardState:
    """The state of one shard in storage, as sets of sample keys."""

    committed: frozenset[str]
    quarantined: frozenset[str]  # without committed samples (P1)
    latents: frozenset[str]  # samples with stored final latents
    sealed: bool
    withdrawn: frozenset[str] = frozenset()  # samples with a tombstone; in neither of the first two sets

    @property
    def terminal(self) -> frozenset[str]:
        return self.committed | self.quarantined | self.withdrawn

    def of(self, keys: Set[str]) -> ShardState:
        """The state without foreign objects, whose names are not in `keys`."""
        sets = (self.committed & keys, self.quarantined & keys, self.latents & keys)
        return ShardState(*sets, self.sealed, self.withdrawn & keys)


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
    scores: Mapping[str, float] | None = None,
    licence: str = TENCENT,
    hook: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The commit record of `sample`.

    `file` is the media's key in the output root, `poster` that of its first frame. `stages` holds a report for each
    stage name: its "seconds" go to the record's `stages`, everything else (node, worker, ...) to its `places`.
    `failures` are the failed attempts before this one (`Failure.to_dict`); `fingerprint` and `licence` are those of the
    run. `scores` are those of the frames (`hv_batch.job.quality`), `hook` is the answer of the sample hook.
    """
    optional = {name: dict(facts) for name, facts in (("scores", scores), ("hook", hook)) if facts}
    return {
        "schema": COMMIT_SCHEMA,
        **describe_sample(sample),
        "file": file,
        "sha256": media.sha256,
        "bytes": media.bytes,
        "poster": poster,
        "frames_sha256": media.frames_sha256,
        "produced": {"num_frames": media.num_frames, "height": media.height, "width": media.width},
        **optional,
        "stages": {name: report["seconds"] for name, report in stages.items()},
        "places": {name: {k: v for k, v in report.items() if k != "seconds"} for name, report in stages.items()},
        "attempts": len(failures) + 1,
        "history": [dict(failure) for failure in failures],
        "versions": dict(versions),
        "fingerprint": fingerprint,
        "licence": licence,
        "created_at": _now(),
    }


def quarantine_record(
    sample: Sample, *, failures: Sequence[Mapping[str, Any]], fingerprint: str, versions: Mapping[str, Any]
) -> dict[str, Any]:
    """The quarantine record of `sample` (P5). The last of `failures` (`Failure.to_dict`) exhausted its retry budget."""
    last = failures[-1]
    return {
        "schema": QUARANTINE_SCHEMA,
        **describe_sample(sample),
        "class": last["kind"],
        "message": last["message"],
        "traceback": last["traceback"],
        "attempts": len(failures),
        "history": [dict(failure) for failure in failures],
        "versions": dict(versions),
        "fingerprint": fingerprint,
        "created_at": _now(),
    }


def with_current_time(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with `created_at` set to now, because a commit may come long after the video was rendered."""
    return {**record, "created_at": _now()}


def commit(store: Store, record: Mapping[str, Any]) -> bool:
    """Commit the record's sample. The media must already be stored.

    Returns True if the sample's commit record is now `record`, False if another one was there first, or if the sample
    was withdrawn. The result of a withdrawn sample is removed.
    """
    return commit_all(store, [record])[0]


def commit_all(store: Store, records: Sequence[Mapping[str, Any]]) -> list[bool]:
    """As `commit`, for each record."""
    objects = {layout.commit_key(record["shard"], record["key"]): encode_line(record) for record in records}
    created = dict(zip(objects, store.put_new_all(objects), strict=True))

    def is_ours(record: Mapping[str, Any]) -> bool:
        # After the put: a withdrawal puts its tombstone before it looks for records, so one of the two sees the other.
        if is_withdrawn(store, record["shard"], record["key"]):
            delete_remnants(store, record["shard"], {record["key"]})
            return False
        target = layout.commit_key(record["shard"], record["key"])
        # A put whose acknowledgement was lost is retried and then finds its own record. This still counts as ours.
        is_ours = created[target] or store.get(target) == objects[target]
        quarantined = layout.quarantine_key(record["shard"], record["key"])
        if store.exists(quarantined):  # on a versioned bucket, every delete of an absent object adds a delete marker
            store.delete(quarantined)
        return is_ours

    return store.each(is_ours, records)


def quarantine(store: Store, record: Mapping[str, Any]) -> bool:
    """Quarantine the record's sample. Returns True if it is quarantined now, False if it is committed or withdrawn."""
    shard, key = record["shard"], record["key"]
    committed, target = layout.commit_key(shard, key), layout.quarantine_key(shard, key)
    if store.exists(committed):
        return False
    store.put_new(target, encode(record))
    if store.exists(committed) or is_withdrawn(store, shard, key):
        store.delete(target)
        return False
    return True


def read_commit(store: Store, shard: int, key: str) -> dict[str, Any]:
    """The commit record of a sample. The paths in it are those of this sample.

    Raises FileNotFoundError if there is none, and InvalidObjectError if it is damaged or that of another sample.
    """
    return read_record(store, layout.commit_key(shard, key), CommitRecord, shard, key)


def read_quarantine(store: Store, shard: int, key: str) -> dict[str, Any]:
    """The quarantine record of a sample. Raises as `read_commit`."""
    return read_record(store, layout.quarantine_key(shard, key), QuarantineRecord, shard, key)


def scan_shard(
    store: Store, shard: int, *, sealed: bool | None = None, keys: frozenset[str] | None = None
) -> ShardState:
    """The state of one shard, from four listings whatever its size.

    `sealed` saves a request if it is known. `keys` are those of the shard's samples: records of other keys are foreign
    and not counted. If it is None, every record with a valid name counts.
    """
    committed, quarantined, latents = (
        layout.sample_keys(store.list(folder))
        for folder in (layout.commit_dir(shard), layout.quarantine_dir(shard), layout.latent_dir(shard))
    )
    if sealed is None:
        sealed = store.exists(layout.metadata_key(shard))
    withdrawn = withdrawn_keys(store, shard)
    committed -= withdrawn
    state = ShardState(committed, quarantined - committed - withdrawn, latents, sealed, withdrawn)
    return state if keys is None else state.of(keys)


def find_shards(store: Store, chosen: Sequence[int], folders: Iterable[str] = layout.SHARD_FOLDERS) -> list[int]:
    """Those of the shards `chosen` of which the root holds anything in one of `folders`, in order.

    One listing for each folder. A run.json may claim a billion shards, so the work of a reader must follow from the
    objects that exist (P7).
    """
    names = {name.partition(".")[0] for each in store.each(store.names, folders) for name in each}
    allowed = chosen if isinstance(chosen, range) else frozenset(chosen)
    return sorted(number for name in names if (number := layout.shard_number(name)) is not None and number in allowed)


def describe_sample(sample: Sample) -> dict[str, Any]:
    """The fields of a record that the plan determines."""
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
