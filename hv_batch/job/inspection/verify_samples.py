"""Checks one sample: its record against the plan, and its media and poster against the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any

from hv_batch.job import layout
from hv_batch.job.documents.reading import InvalidObjectError, read
from hv_batch.job.documents.schema import RetriedRecord
from hv_batch.job.formatting import plural
from hv_batch.job.inspection.findings import Fault, Finding, examine, object_finding
from hv_batch.job.inspection.verify_plan import PlannedSamples
from hv_batch.job.licences import run_licence
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.commits import describe_sample, read_commit, read_quarantine
from hv_batch.job.records.withdrawn import read_tombstone
from hv_batch.job.storage.store import Store
from hv_batch.job.user_input import shorten


@dataclass(frozen=True, slots=True)
class MediaShape:
    """The shape of a decoded media file: number of frames, height and width in pixels."""

    num_frames: int
    height: int
    width: int


# Decodes all frames of a media file, given its bytes and its suffix. Raises ValueError if the file is damaged.
Decode = Callable[[bytes, str], MediaShape]


@dataclass(frozen=True, slots=True)
class CheckedSample:
    record: Mapping[str, Any] | None  # None if it is damaged or belongs to another sample or run
    findings: Sequence[Finding]
    bytes: int = 0
    decoded: bool = False


class SampleChecker:
    """Checks samples of one run. `run` is its run.json. May be used in several threads."""

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        self.store = store
        self._identities = {each["fingerprint"]: each["identity"] for each in (*run.get("earlier", ()), run)}
        self._licence = run_licence(run)
        self._has_posters = bool(run["config"].get("media", {}).get("poster"))

    def check(self, shard: int, key: str, plan: PlannedSamples, decode: Decode | None) -> CheckedSample:
        """Check a committed sample. `plan` holds the samples of its shard. `decode`, if given, decodes its media."""
        name = layout.commit_key(shard, key)
        try:
            record = examine(self.store, name, partial(read_commit, self.store, shard, key))
        except FileNotFoundError:  # removed since the listing
            return CheckedSample(None, [])
        if isinstance(record, InvalidObjectError):
            return CheckedSample(None, [object_finding(record, Fault.RECORD, shard, key, name)])
        allowed = {"fingerprint": self._identities, "licence": (self._licence,)}
        if other := [field for field, values in allowed.items() if record[field] not in values]:
            details = f"{name}: its {other[0]} is {record[other[0]]}, not that of {layout.RUN}"
            return CheckedSample(None, [Finding(shard, key, Fault.RECORD, details, (name,), layout.RUN)])
        planned = plan.of(record)
        if planned and (difference := plan_difference(record, planned)):
            finding = Finding(shard, key, Fault.RECORD, f"{name}: {difference}", (name,), layout.INDEX)
            return CheckedSample(None, [finding])
        findings = self._check_poster(record)
        if problem := self._local_size_problem(record):
            return CheckedSample(record, [*findings, Finding(shard, key, *problem, (name, record["file"]))])
        media = self._read(record, record["file"], Fault.MISSING)
        if isinstance(media, Finding):
            return CheckedSample(record, [*findings, media])
        if problem := _media_problem(record, media, decode):
            findings.append(Finding(shard, key, *problem, (name, record["file"])))
        return CheckedSample(record, findings, len(media), decode is not None)

    def check_quarantined(self, shard: int, key: str, plan: PlannedSamples) -> list[Finding]:
        name = layout.quarantine_key(shard, key)
        try:
            record = examine(self.store, name, partial(read_quarantine, self.store, shard, key))
        except FileNotFoundError:  # committed since the listing
            return []
        if isinstance(record, InvalidObjectError):
            return [object_finding(record, Fault.RECORD, shard, key, name)]
        planned = plan.of(record)
        if planned and (difference := plan_difference(record, planned)):
            return [Finding(shard, key, Fault.RECORD, f"{name}: {difference}", (name,))]
        return []

    def check_retried(self, shard: int, key: str) -> list[Finding]:
        name = layout.retried_key(shard, key)
        try:
            found = examine(self.store, name, lambda: read(self.store, name, RetriedRecord))
        except FileNotFoundError:
            return []
        return [object_finding(found, Fault.HISTORY, shard, key, name)] if isinstance(found, InvalidObjectError) else []

    def check_withdrawn(self, shard: int, key: str, planned: Sample | None, left: Sequence[str]) -> list[Finding]:
        """Check the tombstone of a sample. `left` are the objects of it that should not exist."""
        name = layout.withdrawn_key(shard, key)
        findings = []
        if left:
            details = f"{plural(len(left), 'object')} of it still exist, for example {left[0]}"
            findings.append(Finding(shard, key, Fault.WITHDRAWN, details, tuple(left)))
        try:
            record = examine(self.store, name, partial(read_tombstone, self.store, shard, key))
        except FileNotFoundError:
            return findings
        remedy = "The sample counts as withdrawn. `hv-batch withdraw` writes the tombstone again"
        if isinstance(record, InvalidObjectError):
            found = object_finding(record, Fault.TOMBSTONE, shard, key)
            findings.append(replace(found, details=f"{found.details}. {remedy}"))
        elif planned and (difference := plan_difference(record, planned)):
            findings.append(Finding(shard, key, Fault.TOMBSTONE, f"{name}: {difference}. {remedy}"))
        return findings

    def check_absent(self, shard: int, key: str | None, name: str) -> list[Finding]:
        """Check that there is no object `name`, rather than one that no listing shows, such as a folder."""
        try:
            found = examine(self.store, name, partial(self.store.get, name))
        except FileNotFoundError:
            return []
        return [object_finding(found, Fault.RECORD, shard, key)] if isinstance(found, InvalidObjectError) else []

    def _read(self, record: Mapping[str, Any], name: str, missing: Fault) -> bytes | Finding:
        """A file of a committed sample, or the finding if it is missing or cannot be read."""
        shard, key = record["shard"], record["key"]
        try:
            data = examine(self.store, name, partial(self.store.get, name))
        except FileNotFoundError:
            return Finding(shard, key, missing, f"{name} is missing", (layout.commit_key(shard, key),))
        return object_finding(data, missing, shard, key) if isinstance(data, InvalidObjectError) else data

    def _local_size_problem(self, record: Mapping[str, Any]) -> tuple[Fault, str] | None:
        """A local file that is larger than recorded is not read: it may be sparse, and larger than the memory."""
        if self.store.folder is None:
            return None
        try:
            size = self.store.size(record["file"])
        except OSError:  # the read reports it
            return None
        return _size_problem(record, size) if size > record["bytes"] else None

    def _expects_poster(self, fingerprint: str) -> bool:
        """Whether each video of this identity must have a poster. `media.poster` may change if it is not part of it."""
        media = self._identities[fingerprint].get("media")
        return self._has_posters if media is None else bool(media.get("poster"))

    def _check_poster(self, record: Mapping[str, Any]) -> list[Finding]:
        # The uncompressed first frame is not stored anywhere, so the sample must be rendered again.
        shard, key, poster = record["shard"], record["key"], record["poster"]
        commit = layout.commit_key(shard, key)
        if poster is None:
            expected = self._expects_poster(record["fingerprint"]) and record["params"]["num_frames"] > 1
            details = "the record names no poster, although media.poster is set"
            return [Finding(shard, key, Fault.POSTER, details, (commit,), layout.RUN)] if expected else []
        data = self._read(record, poster, Fault.POSTER)
        if isinstance(data, Finding):
            return [data]
        if poster == layout.poster_key(shard, key, digest := sha256(data).hexdigest()):
            return []
        details = f"{poster} has the sha256 {digest}, which does not match its name"
        return [Finding(shard, key, Fault.POSTER, details, (commit, poster))]


def plan_difference(record: Mapping[str, Any], planned: Sample) -> str | None:
    """The first field of a record that differs from the manifest; None if there is none."""
    for name, expected in describe_sample(planned).items():
        recorded = record.get(name, expected)  # a quarantine record of an early version lacks some
        if recorded == expected:
            continue
        if isinstance(expected, dict) and isinstance(recorded, dict):
            inner = next(key for key in (*expected, *recorded) if recorded.get(key) != expected.get(key))
            name, recorded, expected = f"{name}.{inner}", recorded.get(inner), expected.get(inner)
        return f"its {name} is {shorten(recorded)}; the manifest has {shorten(expected)}"
    return None


def _size_problem(record: Mapping[str, Any], size: int) -> tuple[Fault, str]:
    return Fault.SIZE, f"{record['file']} has {size:,} bytes; recorded: {record['bytes']:,}"


def _media_problem(record: Mapping[str, Any], media: bytes, decode: Decode | None) -> tuple[Fault, str] | None:
    if len(media) != record["bytes"]:
        return _size_problem(record, len(media))
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


def _describe(shape: MediaShape) -> str:
    return f"{shape.num_frames} frames of {shape.width}x{shape.height}"
