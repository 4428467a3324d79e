"""Whether an output root holds what its records say, and taking back what it does not.

Everything is read from storage: each commit record, the whole of its media, and the tables of the sealed shards. Some
or all media are decoded as well; bytes that hash as recorded were whole when they were written, so a sample of them
tells whether what was written is a video.

`repair` removes exactly what is wrong, in an order that leaves a root that can be resumed wherever it is cut short:
first the seals (of the run, then of the shard: `unseal_shard`), then the record, then the media it named. A sample
without a record is pending, so the same run command renders it again (from its latents where they were kept) and seals
the shard again. Media removed before their record would be a sample that is done and cannot be seen; a record removed
before the seal would be a pending sample that no run looks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from hashlib import sha256
from itertools import groupby
from operator import attrgetter
from typing import Any

from hv_batch.job import layout
from hv_batch.job.commits import COMMIT_SCHEMA, read_commit
from hv_batch.job.dataset import describe_row, read_rows, unseal_shard
from hv_batch.job.inputs import shorten
from hv_batch.job.runs import read_run
from hv_batch.job.status import read_status
from hv_batch.job.storage import Store

READERS = 8  # each holds one whole video: 8 x 50 MB, and a decoder beside it
MAX_LINES = 100  # of findings in the text


class Fault(StrEnum):
    """What is wrong with one sample, or with a shard's table."""

    RECORD = "record"  # cannot be read, or is of another sample or run
    TWO_RECORDS = "two records"  # a quarantine record beside the commit record
    MISSING = "media missing"
    SIZE = "media size"
    HASH = "media sha256"
    UNDECODABLE = "media does not decode"
    GEOMETRY = "media frames"  # another number of frames, or another size, than the sample's
    TABLE = "metadata"  # cannot be read, or says other than the records


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `removes` are the keys that `repair` removes after the seals, in this order."""

    shard: int
    key: str | None  # of the sample; None for the shard's table
    fault: Fault
    details: str
    removes: tuple[str, ...] = ()

    def render(self) -> str:
        where = self.key if self.key is not None else layout.metadata_key(self.shard)
        return f"{layout.shard_name(self.shard)}  {where}: {self.fault.value}: {self.details}"


@dataclass(frozen=True, slots=True)
class Picture:
    """What a decoder saw of a media file."""

    num_frames: int
    height: int
    width: int


# Decodes the bytes of a media file with this suffix from end to end; raises ValueError with the reason when it cannot.
Decode = Callable[[bytes, str], Picture]


@dataclass(slots=True)
class Verification:
    """What was looked at, and what was found wrong."""

    url: str
    checked: int = 0  # committed samples
    decoded: int = 0
    bytes: int = 0
    tables: int = 0
    pending: int = 0
    quarantined: int = 0
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        numbers = {name: value for name, value in asdict(self).items() if name != "findings"}
        faults = Counter(finding.fault.value for finding in self.findings)
        found = [asdict(finding) | {"fault": finding.fault.value} for finding in self.findings]
        return numbers | {"faults": dict(faults), "findings": found}

    def render(self) -> str:
        lines = [
            f"{self.url}: {self.checked:,} committed samples ({self.bytes / 1e9:,.3f} GB), {self.decoded:,} of them "
            f"decoded, and {self.tables:,} tables checked; {self.quarantined:,} samples are quarantined and "
            f"{self.pending:,} pending",
        ]
        lines += [finding.render() for finding in self.findings[:MAX_LINES]]
        if (cut := len(self.findings) - MAX_LINES) > 0:
            lines.append(f"and {cut:,} more; --json lists all")
        lines.append(f"{len(self.findings):,} things are wrong" if self.findings else "nothing is wrong")
        return "\n".join(lines)


def verify(store: Store, decode: Decode, *, decodes: int | None, shards: Collection[int] | None = None) -> Verification:
    """Check a whole output root, or `shards` of it. `decodes` is how many media to decode, spread evenly; None is all.

    Raises UserError when the root holds no run.
    """
    run, status = read_run(store), read_status(store, shards)
    result = Verification(store.url, pending=status.pending, quarantined=status.quarantined)
    every = 1 if decodes is None else -(-status.committed // decodes) if decodes else 0
    with ThreadPoolExecutor(READERS, thread_name_prefix="verify") as pool:
        for shard in status.shards:
            keys = sorted(map(layout.sample_key, store.list(layout.commit_dir(shard.shard))))
            numbers = range(result.checked, result.checked + len(keys))
            decoders = [decode if every and number % every == 0 else None for number in numbers]
            given_up = frozenset(map(layout.sample_key, store.list(layout.quarantine_dir(shard.shard))))
            check = partial(_check_sample, store, run["fingerprint"], shard.shard, given_up)
            samples = list(pool.map(check, keys, decoders))
            result.checked += len(samples)
            result.decoded += sum(sample.decoded for sample in samples)
            result.bytes += sum(sample.bytes for sample in samples)
            result.findings += [finding for sample in samples for finding in sample.findings]
            if shard.sealed:
                result.tables += 1
                records = [sample.record for sample in samples if sample.record is not None]
                result.findings += _check_table(store, shard.shard, records)
    return result


def repair(store: Store, findings: Iterable[Finding]) -> None:
    """Remove what is wrong; the order is the module's."""
    for shard, members in groupby(findings, key=attrgetter("shard")):
        wrong = list(members)
        if any(finding.fault is not Fault.TWO_RECORDS for finding in wrong):
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


def _check_sample(
    store: Store, fingerprint: str, shard: int, given_up: frozenset[str], key: str, decode: Decode | None
) -> _Checked:
    commit, beside = layout.commit_key(shard, key), layout.quarantine_key(shard, key)
    found = []
    if key in given_up:
        found.append(Finding(shard, key, Fault.TWO_RECORDS, f"{beside} stands beside {commit}", (beside,)))
    try:
        record = read_commit(store, shard, key)
        problem = _record_problem(record, fingerprint, shard, key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"cannot be read: {type(error).__name__}: {error}"
    if problem:
        return _Checked(None, [*found, Finding(shard, key, Fault.RECORD, problem, (commit,))])
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
    describe_row(record)  # raises KeyError for what it lacks
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
    asked = Picture(**{side: record["params"][side] for side in ("num_frames", "height", "width")})
    if seen != asked:
        return Fault.GEOMETRY, f"{record['file']} shows {_tell(seen)}, asked were {_tell(asked)}"
    return None


def _tell(picture: Picture) -> str:
    return f"{picture.num_frames} frames of {picture.width}x{picture.height}"


def _check_table(store: Store, shard: int, records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A sealed shard's table against its records; those that cannot be read have been told already."""
    expected = {record["key"]: describe_row(record) for record in records}
    try:
        rows = {row["key"]: row for row in read_rows(store, shard)}
    except ValueError as error:
        return [Finding(shard, None, Fault.TABLE, str(error))]
    details = [
        f"the row of {key} says {name} = {shorten(rows[key][name])}, its record {shorten(value)}"
        for key in expected.keys() & rows.keys()
        for name, value in expected[key].items()
        if rows[key][name] != value
    ]
    if absent := sorted(expected.keys() - rows.keys()):
        details.append(f"{len(absent)} committed samples have no row, as {absent[0]}")
    if foreign := sorted(rows.keys() - expected.keys()):
        details.append(f"{len(foreign)} rows have no commit record, as {foreign[0]}")
    return [Finding(shard, None, Fault.TABLE, "; ".join(sorted(details)[:3]))] if details else []
