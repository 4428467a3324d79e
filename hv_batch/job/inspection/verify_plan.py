"""Checks what a whole run shares: run.json, the checked manifest in `plan/`, the lease and the summary.

Records are compared with the manifest in `plan/`, which the fingerprint of run.json covers by its digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ValidationError

from hv_batch.job import layout
from hv_batch.job.config.retired_keys import replace_retired
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import Defaults
from hv_batch.job.dataset.card import card_problem
from hv_batch.job.documents.fields import Document
from hv_batch.job.documents.reading import InvalidObjectError, read
from hv_batch.job.documents.schema import ChoicesDocument, LeaseDocument, SummaryDocument
from hv_batch.job.event_log.reader import check_part, list_parts
from hv_batch.job.inspection.findings import Fault, Finding, Verification, examine, object_finding
from hv_batch.job.manifest.index import Index, is_whole, read_index
from hv_batch.job.manifest.planned_keys import belongs_to
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.samples import CheckedRow, Sample, make_samples
from hv_batch.job.records.run_document import read_run
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

MIN_SHARED = 2  # samples: a fault of one sample alone says nothing about the run


@dataclass(slots=True)
class Plan:
    """The samples of a run from `plan/`; without an index, records are not compared with the manifest.

    `earlier` has the config with the defaults of each former identity, by fingerprint, if they differ.
    """

    index: Index | None = None
    findings: list[Finding] = field(default_factory=list)
    earlier: Mapping[str, RunConfig] = field(default_factory=dict)

    def keys(self, shard: int) -> frozenset[str] | None:
        """The keys of the samples of a shard; None if they are unknown."""
        return None if self.index is None else frozenset(self.index.keys(shard))

    def samples(self, shard: int) -> PlannedSamples:
        """The samples of a shard; none if they are unknown."""
        if self.index is None:
            return PlannedSamples({})
        try:
            by_key = {sample.key: sample for sample in self.index.samples(shard)}
            rows = {row.number: (first, row) for first, row in self.index.rows(shard)} if self.earlier else {}
            return PlannedSamples(by_key, rows, self.earlier)
        except InvalidObjectError as error:
            self.findings.append(object_finding(error, Fault.PLAN, None, None, layout.INDEX))
            return PlannedSamples({})


@dataclass(frozen=True, slots=True)
class PlannedSamples:
    """The samples of a shard by key, and their rows by number with the number of the first sample of each.

    `earlier` has the configs of former identities by fingerprint. There may be thousands, and a record names one: a
    sample is made for it then.
    """

    by_key: Mapping[str, Sample]
    rows: Mapping[int, tuple[int, CheckedRow]] = field(default_factory=dict)
    earlier: Mapping[str, RunConfig] = field(default_factory=dict)

    def of(self, record: Mapping[str, Any]) -> Sample | None:
        """The sample of a record, under the identity that the record names; None if it is unknown."""
        sample, config = self.by_key.get(record["key"]), self.earlier.get(record.get("fingerprint", ""))
        if sample is None or config is None:
            return sample
        first, row = self.rows[sample.row]
        return next(make_samples(row, first, config, config.defaults.model_dump(), sample.video_index), None)


def open_plan(store: Store, run: Mapping[str, Any]) -> Plan:
    """The plan of the run `run` (its run.json). A resume needs the manifest if the plan is damaged."""
    try:
        found = examine(store, layout.INDEX, lambda: read_index(store))
    except FileNotFoundError:  # a root of an early version; a resume checks the manifest again
        return Plan()
    if isinstance(found, InvalidObjectError):
        return Plan(findings=[object_finding(found, Fault.PLAN, None, None, layout.INDEX)])
    if not belongs_to(found.document, run):
        details = f"{layout.INDEX} is not that of the manifest that {layout.RUN} names"
        return Plan(findings=[Finding(None, None, Fault.PLAN, details)])
    whole = (examine(store, part.name, partial(is_whole, store, part)) is True for part in found.parts)
    damaged = [part.name for part, is_whole_part in zip(found.parts, whole, strict=True) if not is_whole_part]
    if damaged:
        details = f"{len(damaged):,} of {len(found.parts):,} parts are missing or damaged, for example {damaged[0]}"
        # Without its document there is no index, so the same run command writes it again from the manifest.
        return Plan(findings=[Finding(None, None, Fault.PLAN, details, (layout.INDEX,))])
    try:
        config = RunConfig.model_validate(replace_retired(dict(run["config"])))
    except (ValidationError, UserError, TypeError) as error:
        details = f"the config in {layout.RUN} is not valid for this version of hv_batch: {error}"
        return Plan(findings=[Finding(None, None, Fault.RUN, details)])
    plan = Plan(Index(store, found.document, config))
    plan.earlier = dict(_earlier_configs(run, config, plan))
    return plan


def _earlier_configs(run: Mapping[str, Any], config: RunConfig, plan: Plan) -> Iterator[tuple[str, RunConfig]]:
    """The config of each former identity whose defaults differ from the run's, by fingerprint."""
    for each in run.get("earlier", ()):
        recorded = each["identity"].get("defaults", run["identity"].get("defaults"))
        if recorded == run["identity"].get("defaults") or each["fingerprint"] == run["fingerprint"]:
            continue
        try:
            defaults = Defaults.model_validate(recorded)
        except ValidationError as error:
            details = f"the defaults of an earlier identity in {layout.RUN} are not valid: {error}"
            plan.findings.append(Finding(None, None, Fault.RUN, details))
            continue
        yield each["fingerprint"], config.model_copy(update={"defaults": defaults})


def _unreadable(store: Store, key: str, document: type[Document], fault: Fault) -> Iterator[Finding]:
    """A finding if this object exists and cannot be read."""
    try:
        found = examine(store, key, lambda: read(store, key, document))
    except FileNotFoundError:
        return
    if isinstance(found, InvalidObjectError):
        yield object_finding(found, fault)


def check_run_objects(
    store: Store, run: Mapping[str, Any], result: Verification, *, is_whole_run: bool
) -> Iterator[Finding]:
    """Check the lease, the choices, the events, `_SUCCESS`, the card and the summary against the counts in `result`."""
    # The next run replaces the lease. Choices cannot be recomputed, so nothing removes them.
    yield from _unreadable(store, layout.LEASE, LeaseDocument, Fault.LEASE)
    yield from _unreadable(store, layout.CHOICES, ChoicesDocument, Fault.CHOICES)
    yield from _check_events(store)
    if not store.exists(layout.SUCCESS):
        yield from _check_card(store, run, None)
        return
    if result.pending or result.open_shards:
        details = (
            f"the run is marked as finished, but {result.pending:,} samples are pending and {result.open_shards:,} "
            "shards are not sealed"
        )
        yield Finding(None, None, Fault.SUCCESS, details, (layout.SUCCESS,))
        return
    try:
        summary = examine(store, layout.SUMMARY, lambda: read(store, layout.SUMMARY, SummaryDocument))
    except FileNotFoundError:
        yield Finding(None, None, Fault.SUMMARY, f"{layout.SUMMARY} is missing; a resume writes it again")
        return
    if isinstance(summary, InvalidObjectError):
        yield object_finding(summary, Fault.SUMMARY, None, None, layout.SUMMARY)
        return
    expected = {"fingerprint": run["fingerprint"]}
    if is_whole_run:
        expected |= {"pending": 0, "quarantined": result.quarantined, "withdrawn": result.withdrawn}
        if not any(finding.fault is Fault.UNREADABLE for finding in result.findings):
            expected["committed"] = result.checked
    for name, value in expected.items():
        if (written := summary.get(name, 0)) != value:  # `withdrawn` is absent if it is 0
            details = f"{layout.SUMMARY}: its {name} is {written!r}, not {value!r}"
            yield Finding(None, None, Fault.SUMMARY, details, (layout.SUMMARY,))
            return
    yield from _check_card(store, run, summary)


def _check_events(store: Store) -> Iterator[Finding]:
    """Check the parts that are read. Removing a damaged one costs a piece of the history and nothing else."""
    parts = examine(store, layout.EVENTS, lambda: list_parts(store))
    if isinstance(parts, InvalidObjectError):
        yield object_finding(parts, Fault.EVENTS)
        return
    for problem in store.each(partial(check_part, store), parts):
        if problem is not None:
            yield object_finding(problem, Fault.EVENTS, None, None, problem.key)


def _check_card(store: Store, run: Mapping[str, Any], summary: Mapping[str, Any] | None) -> Iterator[Finding]:
    problem = examine(store, layout.CARD, lambda: card_problem(store, run, summary))
    if isinstance(problem, InvalidObjectError):
        yield object_finding(problem, Fault.CARD)
    elif problem:
        yield Finding(None, None, Fault.CARD, problem, (layout.CARD,))


def without_shared(findings: list[Finding], records: int) -> list[Finding]:
    """The findings, with one in place of those that all of the `records` share.

    If every record differs from run.json or from the plan, that object is wrong and not the records. Nothing is removed
    then: the records could not be rendered again.
    """
    for name in (layout.RUN, layout.INDEX):
        shared = [finding for finding in findings if finding.compared_with == name]
        if records >= MIN_SHARED and len({(finding.shard, finding.key) for finding in shared}) == records:
            details = (
                f"{name} differs from all {records:,} commit records, so it was changed and they were not; for example "
                f"{shared[0].details}. Restore it from a copy"
            )
            kept = [finding for finding in findings if finding.compared_with != name]
            findings = [Finding(None, None, Fault.RUN, details), *kept]
    return findings


def refuse_loss(store: Store, findings: Iterable[Finding]) -> None:
    """Raise UserError if what `findings` would remove could not be rendered again.

    A wrong run.json makes sound records look wrong. Without an index, a run needs its manifest.
    """
    for finding in findings:
        if finding.fault is Fault.RUN:
            raise UserError(
                f"Nothing was removed from {public_url(store.url)}, because the run could not be resumed: "
                f"{finding.details}."
            )
        if layout.INDEX in finding.removes:
            run = read_run(store)
            if not _has_manifest(run):
                raise UserError(
                    f"Nothing was removed from {public_url(store.url)}: {finding.details}, and the manifest "
                    f"{run['manifest']['url']}, from which a run would write it again, is missing or was changed. "
                    "Restore the manifest or plan/ from a copy."
                )


def _has_manifest(run: Mapping[str, Any]) -> bool:
    try:
        digest = Manifest(run["manifest"]["url"]).read_digest()
    except (UserError, OSError):
        return False
    return digest == run["identity"].get("manifest", digest)
