"""Checks that an output root holds what its records describe, and removes what is damaged.

Everything is read from storage: each commit record, all bytes of its media and poster, and the files of sealed shards.
Records are compared with run.json and with the checked manifest. An object that is invalid or cannot be read becomes a
finding and does not stop the check of the others.
Some or all media are also decoded. Bytes with the recorded hash are complete, so decoding a subset is enough to find
out whether valid videos were written.

`remove_faults` removes exactly what is damaged and was read, in an order that leaves a resumable root at any time:
first the seals (of the run, then of the shard: `unseal_shard`), then the record, then the media that it names. A sample
without a record is pending, so the same run command renders it again (from its latents if they were kept) and seals the
shard again. If media were removed before their record, the sample would be committed without a video. If a record were
removed before the seal, the sample would be pending in a shard that no run processes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

from hv_batch.job import layout
from hv_batch.job.documents.reading import InvalidObjectError
from hv_batch.job.inspection.findings import OUTSIDE_SEAL, Fault, Finding, Verification, examine, object_finding
from hv_batch.job.inspection.identity_counts import with_history
from hv_batch.job.inspection.verify_plan import Plan, check_run_objects, open_plan, without_shared
from hv_batch.job.inspection.verify_samples import CheckedSample, Decode, MediaShape, SampleChecker
from hv_batch.job.inspection.verify_seal import check_sealed
from hv_batch.job.records.commits import find_shards
from hv_batch.job.records.run_document import chosen_shards, plan_size, read_run, shard_samples
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.records.withdrawn import remnants
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

__all__ = ["Decode", "MediaShape", "remove_faults", "verify"]

READERS = 8  # each holds one complete video and runs a decoder: 8 x 50 MB
LISTERS = 16  # listings wait for the store, not for the CPU

# The name of a media file or poster: the sample's key, eight digits of the file's hash, a suffix.
_MEDIA = re.compile(r"(?P<key>.+)-[0-9a-f]{8}\.[A-Za-z0-9]+")


def verify(store: Store, decode: Decode, *, decodes: int | None, shards: Collection[int] | None = None) -> Verification:
    """Check an output root, or `shards` of it. `decodes` is the number of media to decode, evenly spaced; None is all.

    Raises UserError if the root has no run, or if its run.json contradicts itself.
    """
    run = read_run(store)
    plan = open_plan(store, run)
    result = Verification(store.url, compared=plan.index is not None)
    found = _find_shards(store, run, chosen_shards(run, shards), result)
    every = 1 if decodes is None else -(-_count_committed(store, found) // decodes) if decodes else 0
    checker = SampleChecker(store, run)
    by_identity: Counter[str] = Counter()
    for shard in found:
        listing = _list_shard(store, plan, shard)
        samples = _check_shard(checker, plan, listing, _Decodes(decode, every, result.checked))
        result.checked += len(samples)
        result.decoded += sum(sample.decoded for sample in samples)
        result.bytes += sum(sample.bytes for sample in samples)
        by_identity.update(sample.record["fingerprint"] for sample in samples if sample.record is not None)
        result.findings += listing.findings
        _count(run, listing, result)
        if listing.sealed and not any(finding.fault is Fault.UNREADABLE for finding in listing.findings):
            records = [sample.record for sample in samples if sample.record is not None]
            result.findings += check_sealed(store, shard, records, run)
    result.identities = with_history(run, by_identity)
    of_run = check_run_objects(store, run, result, is_whole_run=shards is None)
    result.findings = without_shared([*plan.findings, *of_run, *result.findings], result.checked)
    return result


def _find_shards(store: Store, run: Mapping[str, Any], chosen: Sequence[int], result: Verification) -> Sequence[int]:
    """The shards of `chosen` of which the root holds anything. All samples of the others are pending."""
    found: set[int] = set()
    for folder in layout.SHARD_FOLDERS:
        of_folder = examine(store, folder, partial(find_shards, store, chosen, [folder]))
        if isinstance(of_folder, InvalidObjectError):
            result.findings.append(object_finding(of_folder, Fault.UNREADABLE))
        else:
            found.update(of_folder)
    result.open_shards += len(chosen) - len(found)
    if not result.findings:
        total = plan_size(run)[0] if isinstance(chosen, range) else sum(map(partial(shard_samples, run), chosen))
        result.pending += total - sum(map(partial(shard_samples, run), found))
    return sorted(found)


def remove_faults(store: Store, findings: Iterable[Finding]) -> None:
    """Remove what `findings` name, in the order that the module's docstring explains."""
    for shard, group in groupby(findings, key=attrgetter("shard")):
        in_shard = [finding for finding in group if finding.is_removable]
        if shard is not None and any(finding.fault not in OUTSIDE_SEAL for finding in in_shard):
            unseal_shard(store, shard)
        for finding in in_shard:
            for key in finding.removes:
                store.delete(key)


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Which media are decoded: every `every`th committed sample of the run, none if it is 0."""

    decode: Decode
    every: int
    before: int  # committed samples of the shards before

    def of(self, number: int) -> Decode | None:
        return self.decode if self.every and (self.before + number) % self.every == 0 else None


@dataclass(frozen=True, slots=True)
class _Listing:
    """The objects of one shard, from listings. Foreign objects are only among the findings."""

    shard: int
    keys: frozenset[str] | None  # of all samples; None if the plan is unknown
    committed: frozenset[str]
    quarantined: frozenset[str]
    retried: frozenset[str]
    withdrawn: frozenset[str]
    sealed: bool
    findings: list[Finding]


def _list_shard(store: Store, plan: Plan, shard: int) -> _Listing:
    findings: list[Finding] = []
    keys = plan.keys(shard)

    def listing(folder: str) -> list[str]:
        found = examine(store, folder, lambda: list(store.list(folder)))
        if isinstance(found, InvalidObjectError):
            findings.append(object_finding(found, Fault.UNREADABLE, shard))
            return []
        return found

    def sample_keys(folder: str) -> frozenset[str]:
        ours = set()
        for name in listing(folder):
            key = layout.sample_key(name)
            if key is None or (keys is not None and key not in keys):
                findings.append(_foreign(shard, name))
            else:
                ours.add(key)
        return frozenset(ours)

    committed, quarantined = sample_keys(layout.commit_dir(shard)), sample_keys(layout.quarantine_dir(shard))
    retried = sample_keys(layout.retried_dir(shard))
    withdrawn = sample_keys(layout.withdrawn_dir(shard))
    for folder in (layout.latent_dir(shard), f"{layout.STEPS}{layout.shard_name(shard)}/"):
        sample_keys(folder)
    sealed = False
    for folder in (layout.media_dir(shard), layout.poster_dir(shard)):
        for name in listing(folder):
            if name == layout.metadata_key(shard):
                sealed = True
            elif not _is_media(name.removeprefix(folder), keys):
                findings.append(_foreign(shard, name))
    records = (committed - withdrawn, quarantined - withdrawn, retried - withdrawn)
    return _Listing(shard, keys, *records, withdrawn, sealed, findings)


def _check_shard(checker: SampleChecker, plan: Plan, listing: _Listing, decodes: _Decodes) -> list[CheckedSample]:
    """Check every sample of a shard. The findings are added to those of the listing."""
    shard, findings = listing.shard, listing.findings
    is_listed = not any(finding.fault is Fault.UNREADABLE for finding in findings)
    planned = plan.samples(shard)
    committed = sorted(listing.committed)
    for key in sorted(listing.committed & listing.quarantined):
        quarantine = layout.quarantine_key(shard, key)
        details = f"both {layout.commit_key(shard, key)} and {quarantine} exist"
        findings.append(Finding(shard, key, Fault.TWO_RECORDS, details, (quarantine,)))

    def check(number: int) -> CheckedSample:
        key = committed[number]
        return checker.check(shard, key, planned, decodes.of(number))

    samples = list(map_in_threads(check, range(len(committed)), READERS))
    findings += [finding for sample in samples for finding in sample.findings]
    for key in sorted(listing.quarantined - listing.committed):
        findings += checker.check_quarantined(shard, key, planned)
    for key in sorted(listing.retried):
        findings += checker.check_retried(shard, key)
    left = remnants(checker.store, shard, listing.withdrawn) if listing.withdrawn and is_listed else {}
    for key in sorted(listing.withdrawn):
        findings += checker.check_withdrawn(shard, key, planned.by_key.get(key), left.get(key, []))
    terminal = listing.committed | listing.quarantined | listing.withdrawn
    if is_listed and (terminal or listing.sealed):  # in an untouched shard, every sample is pending
        pending = sorted((listing.keys or frozenset()) - terminal)
        names: list[tuple[str | None, str]]
        names = [(key, name(shard, key)) for key in pending for name in (layout.commit_key, layout.quarantine_key)]
        names += [] if listing.sealed else [(None, layout.metadata_key(shard))]
        findings += [finding for key, name in names for finding in checker.check_absent(shard, key, name)]
    return samples


def _count(run: Mapping[str, Any], listing: _Listing, result: Verification) -> None:
    """Add the shard to the totals, unless a listing failed and its records are unknown."""
    result.tables += listing.sealed
    result.open_shards += not listing.sealed
    quarantined = len(listing.quarantined - listing.committed)
    result.quarantined += quarantined
    result.withdrawn += len(listing.withdrawn)
    if not any(finding.fault is Fault.UNREADABLE and finding.key is None for finding in listing.findings):
        samples = shard_samples(run, listing.shard)
        result.pending += max(0, samples - len(listing.committed) - quarantined - len(listing.withdrawn))


def _is_media(name: str, keys: frozenset[str] | None) -> bool:
    match = _MEDIA.fullmatch(name)
    return match is not None and (layout.is_sample_key(match["key"]) if keys is None else match["key"] in keys)


def _foreign(shard: int, name: str) -> Finding:
    return Finding(shard, None, Fault.FOREIGN, f"{name} belongs to no sample of this run; it is counted nowhere")


def _count_committed(store: Store, shards: Sequence[int]) -> int:
    def count(shard: int) -> int:
        folder = layout.commit_dir(shard)
        found = examine(store, folder, lambda: len(layout.sample_keys(store.list(folder))))
        return 0 if isinstance(found, InvalidObjectError) else found

    return sum(map_in_threads(count, shards, LISTERS))
