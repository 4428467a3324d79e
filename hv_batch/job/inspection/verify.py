"""Checks that an output root holds what its records describe, and removes what is damaged.

Everything is read from storage: each commit record, all bytes of its media and poster, and the files of sealed shards.
Some or all media are also decoded. Bytes with the recorded hash are complete, so decoding a subset is enough to find
out whether valid videos were written.

`remove_faults` removes exactly what is damaged, in an order that leaves a resumable root wherever it is interrupted:
first the seals (of the run, then of the shard: `unseal_shard`), then the record, then the media that it names. A sample
without a record is pending, so the same run command renders it again (from its latents if they were kept) and seals the
shard again. If media were removed before their record, the sample would be committed without a video. If a record were
removed before the seal, the sample would be pending in a shard that no run processes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from operator import attrgetter
from typing import Any

from hv_batch.job import layout
from hv_batch.job.dataset.lineage import lineage_table
from hv_batch.job.dataset.seal import metadata_table
from hv_batch.job.dataset.shard_totals import add_up
from hv_batch.job.inspection.findings import Fault, Finding, Verification
from hv_batch.job.inspection.status import Status, read_status
from hv_batch.job.inspection.verify_seal import check_sealed
from hv_batch.job.manifest.index import is_whole, read_index
from hv_batch.job.records.commits import COMMIT_SCHEMA
from hv_batch.job.records.quarantine import UNREADABLE, read_quarantined
from hv_batch.job.records.run_document import read_run
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.storage.canonical_json import decode as decode_record
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

READERS = 8  # each holds one complete video and runs a decoder: 8 x 50 MB


@dataclass(frozen=True, slots=True)
class MediaShape:
    """The shape of a decoded media file: number of frames, height and width in pixels."""

    num_frames: int
    height: int
    width: int


# Decodes all frames of a media file, given its bytes and its suffix. Raises ValueError if the file is damaged.
Decode = Callable[[bytes, str], MediaShape]


def verify(store: Store, decode: Decode, *, decodes: int | None, shards: Collection[int] | None = None) -> Verification:
    """Check an output root, or `shards` of it. `decodes` is the number of media to decode, evenly spaced; None is all.

    Raises UserError if the root has no run.
    """
    run, status = read_run(store), read_status(store, shards)
    result = Verification(store.url, pending=status.pending, quarantined=status.quarantined)
    result.findings += [*_check_success(status), *_check_plan(store)]
    every = 1 if decodes is None else -(-status.committed // decodes) if decodes else 0
    for shard in status.shards:
        keys = sorted(layout.sample_keys(store.list(layout.commit_dir(shard.shard))))
        numbers = range(result.checked, result.checked + len(keys))
        decoders = [decode if every and number % every == 0 else None for number in numbers]
        quarantined = layout.sample_keys(store.list(layout.quarantine_dir(shard.shard)))
        samples = _check_samples(store, run, shard.shard, quarantined, dict(zip(keys, decoders, strict=True)))
        result.findings += _check_quarantine(store, shard.shard)
        result.checked += len(samples)
        result.decoded += sum(sample.decoded for sample in samples)
        result.bytes += sum(sample.bytes for sample in samples)
        result.findings += [finding for sample in samples for finding in sample.findings]
        if shard.sealed:
            result.tables += 1
            records = [sample.record for sample in samples if sample.record is not None]
            result.findings += check_sealed(store, shard.shard, records, run)
    return result


def remove_faults(store: Store, findings: Iterable[Finding]) -> None:
    """Remove what `findings` name, in the order that the module's docstring explains."""
    for shard, group in groupby(findings, key=attrgetter("shard")):
        in_shard = list(group)
        if shard is not None and any(finding.fault is not Fault.TWO_RECORDS for finding in in_shard):
            unseal_shard(store, shard)
        for finding in in_shard:
            for key in finding.removes:
                store.delete(key)


@dataclass(frozen=True, slots=True)
class _Checked:
    record: Mapping[str, Any] | None  # None if it is damaged
    findings: Sequence[Finding]
    bytes: int = 0
    decoded: bool = False


def _check_success(status: Status) -> list[Finding]:
    open_shards = len(status.shards) - status.sealed
    if not status.finished or not (status.pending or open_shards):
        return []
    details = (
        f"the run is marked as finished, but {status.pending:,} samples are pending and {open_shards:,} shards are not "
        "sealed"
    )
    return [Finding(None, None, Fault.SUCCESS, details, (layout.SUCCESS,))]


def _check_quarantine(store: Store, shard: int) -> list[Finding]:
    return [
        Finding(shard, record["key"], Fault.RECORD, record["message"], (layout.quarantine_key(shard, record["key"]),))
        for record in read_quarantined(store, [shard], [UNREADABLE])
    ]


def _check_plan(store: Store) -> list[Finding]:
    """Check the parts of the checked manifest. If one is damaged, a resume needs the manifest, which may be gone."""
    try:
        parts = read_index(store).parts
    except FileNotFoundError:  # a resume checks the manifest again
        return []
    except ValueError as error:
        return [Finding(None, None, Fault.PLAN, str(error), (layout.INDEX,))]
    damaged = [part.name for part in parts if not is_whole(store, part)]
    if not damaged:
        return []
    details = f"{len(damaged):,} of {len(parts):,} parts are missing or damaged, for example {damaged[0]}"
    # Without its document there is no index, so the same run command writes it again from the manifest.
    return [Finding(None, None, Fault.PLAN, details, (layout.INDEX,))]


def _check_samples(
    store: Store, run: Mapping[str, Any], shard: int, quarantined: frozenset[str], decoders: Mapping[str, Decode | None]
) -> list[_Checked]:
    """Check each sample of `decoders`, in that order. Its media is decoded if its decoder is not None."""

    def check(key: str) -> _Checked:
        return _check_sample(store, run, shard, quarantined, key, decoders[key])

    return list(map_in_threads(check, decoders, READERS))


def _check_sample(
    store: Store,
    run: Mapping[str, Any],
    shard: int,
    quarantined: frozenset[str],
    key: str,
    decode: Decode | None,
) -> _Checked:
    commit, quarantine = layout.commit_key(shard, key), layout.quarantine_key(shard, key)
    findings = []
    if key in quarantined:
        details = f"both {commit} and {quarantine} exist"
        findings.append(Finding(shard, key, Fault.TWO_RECORDS, details, (quarantine,)))
    try:
        record = decode_record(store.get(commit))
        problem = _record_problem(record, run["fingerprint"], shard, key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"cannot be read: {type(error).__name__}: {error}"
    if problem:
        return _Checked(None, [*findings, Finding(shard, key, Fault.RECORD, problem, (commit,))])
    if problem := _poster_problem(store, record, run):
        # The uncompressed first frame is not stored anywhere, so the sample must be rendered again.
        findings.append(Finding(shard, key, Fault.POSTER, problem, (commit, *filter(None, [record["poster"]]))))
    try:
        media = store.get(record["file"])
    except FileNotFoundError:
        return _Checked(record, [*findings, Finding(shard, key, Fault.MISSING, record["file"], (commit,))])
    if media_problem := _media_problem(record, media, decode):
        findings.append(Finding(shard, key, *media_problem, (commit, record["file"])))
    return _Checked(record, findings, len(media), decode is not None)


def _record_problem(record: Mapping[str, Any], fingerprint: str, shard: int, key: str) -> str | None:
    expected = {"schema": COMMIT_SCHEMA, "key": key, "shard": shard, "fingerprint": fingerprint}
    for name, value in expected.items():
        if record[name] != value:
            return f"its {name} is {record[name]!r}, not {value!r}"
    folder, _, name = record["file"].rpartition("/")
    if f"{folder}/" != layout.media_dir(shard) or not name:
        return f"its file is {record['file']!r}, not below {layout.media_dir(shard)}"
    poster = record["poster"]
    if poster is not None and f"{poster.rpartition('/')[0]}/" != layout.poster_dir(shard):
        return f"its poster is {poster!r}, not below {layout.poster_dir(shard)}"
    # The functions that a seal applies to the record. They raise if a field is missing or has a wrong type.
    metadata_table([record], {}), lineage_table([record]), add_up([record])
    return None


def _media_problem(record: Mapping[str, Any], media: bytes, decode: Decode | None) -> tuple[Fault, str] | None:
    if len(media) != record["bytes"]:
        return Fault.SIZE, f"{record['file']} has {len(media):,} bytes; recorded: {record['bytes']:,}"
    if (digest := sha256(media).hexdigest()) != record["sha256"]:
        return Fault.HASH, f"{record['file']} has the sha256 {digest}; recorded: {record['sha256']}"
    if decode is None:
        return None
    try:
        decoded = decode(media, f".{record['file'].rpartition('.')[2]}")
    except ValueError as error:
        return Fault.UNDECODABLE, f"{record['file']}: {error}"
    requested = MediaShape(**{side: record["params"][side] for side in ("num_frames", "height", "width")})
    if decoded != requested:
        return Fault.GEOMETRY, f"{record['file']} has {_describe(decoded)}; requested: {_describe(requested)}"
    return None


def _poster_problem(store: Store, record: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    expected = run["config"].get("media", {}).get("poster") and record["params"]["num_frames"] > 1
    if record["poster"] is None:
        return "the record names no poster, although media.poster is set" if expected else None
    try:
        digest = sha256(store.get(record["poster"])).hexdigest()
    except FileNotFoundError:
        return f"{record['poster']} is missing"
    if record["poster"] != layout.poster_key(record["shard"], record["key"], digest):
        return f"{record['poster']} has the sha256 {digest}, which does not match its name"
    return None


def _describe(shape: MediaShape) -> str:
    return f"{shape.num_frames} frames of {shape.width}x{shape.height}"
