"""Whether an output root holds what its records say, and taking back what it does not.

Everything is read from storage: each commit record, the whole of its media and poster, and what the sealed shards were
sealed with. Some or all media are decoded as well; bytes that hash as recorded were whole when they were written, so a
sample of them tells whether what was written is a video.

`remove_faults` removes exactly what is wrong, in an order that leaves a root that can be resumed wherever it is cut
short: first the seals (of the run, then of the shard: `unseal_shard`), then the record, then the media it named. A
sample without a record is pending, so the same run command renders it again (from its latents where they were kept)
and seals the shard again. Media removed before their record would be a sample that is done and cannot be seen; a record
removed before the seal would be a pending sample that no run looks for.
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

READERS = 8  # each holds one whole video: 8 x 50 MB, and a decoder beside it


@dataclass(frozen=True, slots=True)
class MediaShape:
    """What a decoder saw of a media file."""

    num_frames: int
    height: int
    width: int


# Decodes the bytes of a media file with this suffix from end to end; raises ValueError with the reason when it cannot.
Decode = Callable[[bytes, str], MediaShape]


def verify(store: Store, decode: Decode, *, decodes: int | None, shards: Collection[int] | None = None) -> Verification:
    """Check a whole output root, or `shards` of it. `decodes` is how many media to decode, spread evenly; None is all.

    Raises UserError when the root holds no run.
    """
    run, status = read_run(store), read_status(store, shards)
    result = Verification(store.url, pending=status.pending, quarantined=status.quarantined)
    result.findings += [*_check_success(status), *_check_plan(store)]
    every = 1 if decodes is None else -(-status.committed // decodes) if decodes else 0
    for shard in status.shards:
        keys = sorted(layout.sample_keys(store.list(layout.commit_dir(shard.shard))))
        numbers = range(result.checked, result.checked + len(keys))
        decoders = [decode if every and number % every == 0 else None for number in numbers]
        given_up = layout.sample_keys(store.list(layout.quarantine_dir(shard.shard)))
        samples = _check_samples(store, run, shard.shard, given_up, dict(zip(keys, decoders, strict=True)))
        result.findings += _check_given_up(store, shard.shard)
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
    """Remove what is wrong; the order is the module's."""
    for shard, members in groupby(findings, key=attrgetter("shard")):
        wrong = list(members)
        if shard is not None and any(finding.fault is not Fault.TWO_RECORDS for finding in wrong):
            unseal_shard(store, shard)
        for finding in wrong:
            for key in finding.removes:
                store.delete(key)


@dataclass(frozen=True, slots=True)
class _Checked:
    record: Mapping[str, Any] | None  # None when it cannot be used
    findings: Sequence[Finding]
    bytes: int = 0
    decoded: bool = False


def _check_success(status: Status) -> list[Finding]:
    open_shards = len(status.shards) - status.sealed
    if not status.finished or not (status.pending or open_shards):
        return []
    told = (
        f"the run counts as finished, but {status.pending:,} samples are pending and {open_shards:,} shards not sealed"
    )
    return [Finding(None, None, Fault.SUCCESS, told, (layout.SUCCESS,))]


def _check_given_up(store: Store, shard: int) -> list[Finding]:
    return [
        Finding(shard, record["key"], Fault.RECORD, record["message"], (layout.quarantine_key(shard, record["key"]),))
        for record in read_quarantined(store, [shard], [UNREADABLE])
    ]


def _check_plan(store: Store) -> list[Finding]:
    """The parts of the checked manifest: a damaged one makes a resume read the manifest again, which may be gone."""
    try:
        parts = read_index(store).parts
    except FileNotFoundError:  # a resume checks the manifest anew
        return []
    except ValueError as error:
        return [Finding(None, None, Fault.PLAN, str(error), (layout.INDEX,))]
    wrong = [part.name for part in parts if not is_whole(store, part)]
    # Without its document the index counts as none, and the same run command writes it anew from the manifest.
    told = f"{len(wrong):,} of {len(parts):,} parts are missing or damaged, as {wrong[0]}" if wrong else ""
    return [Finding(None, None, Fault.PLAN, told, (layout.INDEX,))] if wrong else []


def _check_samples(
    store: Store, run: Mapping[str, Any], shard: int, given_up: frozenset[str], decoders: Mapping[str, Decode | None]
) -> list[_Checked]:
    """Each sample of `decoders`, in that order; it is decoded if it has a decoder."""

    def check(key: str) -> _Checked:
        return _check_sample(store, run, shard, given_up, key, decoders[key])

    return list(map_in_threads(check, decoders, READERS))


def _check_sample(
    store: Store,
    run: Mapping[str, Any],
    shard: int,
    given_up: frozenset[str],
    key: str,
    decode: Decode | None,
) -> _Checked:
    commit, beside = layout.commit_key(shard, key), layout.quarantine_key(shard, key)
    found = []
    if key in given_up:
        found.append(Finding(shard, key, Fault.TWO_RECORDS, f"{beside} stands beside {commit}", (beside,)))
    try:
        record = decode_record(store.get(commit))
        problem = _record_problem(record, run["fingerprint"], shard, key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"cannot be read: {type(error).__name__}: {error}"
    if problem:
        return _Checked(None, [*found, Finding(shard, key, Fault.RECORD, problem, (commit,))])
    if problem := _poster_problem(store, record, run):
        # The first frame before its compression is nowhere kept, so the sample is rendered again.
        found.append(Finding(shard, key, Fault.POSTER, problem, (commit, *filter(None, [record["poster"]]))))
    try:
        media = store.get(record["file"])
    except FileNotFoundError:
        return _Checked(record, [*found, Finding(shard, key, Fault.MISSING, record["file"], (commit,))])
    wrong = _media_problem(record, media, decode)
    if wrong:
        found.append(Finding(shard, key, *wrong, (commit, record["file"])))
    return _Checked(record, found, len(media), decode is not None)


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
    # What a seal makes of it: they raise what the caller tells of a record that lacks something, or holds nonsense.
    metadata_table([record], {}), lineage_table([record]), add_up([record])
    return None


def _media_problem(record: Mapping[str, Any], media: bytes, decode: Decode | None) -> tuple[Fault, str] | None:
    if len(media) != record["bytes"]:
        return Fault.SIZE, f"{record['file']} has {len(media):,} bytes, recorded are {record['bytes']:,}"
    if (digest := sha256(media).hexdigest()) != record["sha256"]:
        return Fault.HASH, f"{record['file']} has {digest}, recorded is {record['sha256']}"
    if decode is None:
        return None
    try:
        seen = decode(media, f".{record['file'].rpartition('.')[2]}")
    except ValueError as error:
        return Fault.UNDECODABLE, f"{record['file']}: {error}"
    asked = MediaShape(**{side: record["params"][side] for side in ("num_frames", "height", "width")})
    if seen != asked:
        return Fault.GEOMETRY, f"{record['file']} shows {_tell(seen)}, asked were {_tell(asked)}"
    return None


def _poster_problem(store: Store, record: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    asked = run["config"].get("media", {}).get("poster") and record["params"]["num_frames"] > 1
    if record["poster"] is None:
        return "the run makes posters, and the record names none" if asked else None
    try:
        digest = sha256(store.get(record["poster"])).hexdigest()
    except FileNotFoundError:
        return f"{record['poster']} is missing"
    if record["poster"] != layout.poster_key(record["shard"], record["key"], digest):
        return f"{record['poster']} has the sha256 {digest}"
    return None


def _tell(picture: MediaShape) -> str:
    return f"{picture.num_frames} frames of {picture.width}x{picture.height}"
