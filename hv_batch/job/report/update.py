"""Writes the report of an output root, at any time of a run: `report/index.html`, `report/report.json` and the parts.

A part and its digest are written again only if the shard has changed (`shards.listing`). A root that nobody else writes
to is therefore read once, and a later report lists its shards and reads one small digest of each. Everything is read
shard by shard, and only sums are held (P7).

Two processes may write a report at the same time. Each object is whole, and the next report corrects what the slower
one has overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hv_batch.job.event_log.reader import Event, read_events
from hv_batch.job.manifest.planned_keys import PlannedKeys
from hv_batch.job.records.commits import find_shards
from hv_batch.job.records.lease_holder import is_gone, read_lease
from hv_batch.job.records.run_document import plan_size, read_run, shard_samples
from hv_batch.job.records.withdrawn import all_withdrawn
from hv_batch.job.redaction import public_url
from hv_batch.job.report.document import Moment, make_document
from hv_batch.job.report.gpus import gpus_of
from hv_batch.job.report.json_text import encode_json
from hv_batch.job.report.page import render_page
from hv_batch.job.report.report_files import ReportFiles
from hv_batch.job.report.samples import Sample
from hv_batch.job.report.shards.digest import digest_shard, empty_digest
from hv_batch.job.report.shards.listing import ShardListing, list_shard
from hv_batch.job.report.shards.planned import PlannedSamples
from hv_batch.job.report.shards.sealed import SealedTables
from hv_batch.job.report.sums import ReportSums
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads
from hv_batch.protocol import UserError

FIRST_SAMPLES = 60  # in the page itself: the first of all parts, each with the number of its shard
MAX_SHARDS = 200_000  # 51 million samples at the default size; report.json has a line for each
SCANNERS = 16  # listings wait for the store, not for the CPU
SILENT_S = 900.0  # since the last heartbeat of a driver on another machine
NOTHING = "0" * 64  # the state of a shard without any object
REFRESH_S = 60  # of an open page, while the run is at work


@dataclass(frozen=True, slots=True)
class Update:
    """What one update has done."""

    document: Mapping[str, Any]
    data: bytes  # report.json
    page: bytes  # index.html
    shards_read: int  # whose records were read


@dataclass(frozen=True, slots=True)
class _Found:
    """A shard, and its digest if that is current. `listing` is None if the shard was not listed."""

    shard: int
    samples: int
    listing: ShardListing | None
    digest: dict[str, Any] | None


class Reporter:
    """The report of one root. `update` may be called again and again; it must not run twice at once.

    `target` is where the report is written; None for the root itself. A report elsewhere uses the digests in the root
    that are current.
    """

    def __init__(self, store: Store, target: Store | None = None) -> None:
        self._store = store
        self._files = ReportFiles(store, target or store)
        self._events: dict[str, tuple[Event, ...]] = {}  # by part, which never changes

    def update(
        self, *, price_per_gpu_hour: float | None = None, refresh_s: int = REFRESH_S, running: bool | None = None
    ) -> Update:
        """Write what has changed. Without a price, that of the last report stays.

        `running` says whether a driver is at work on the root; by default its lease decides. A driver that passes True
        holds the lease, so nobody else changes its sealed shards: those that were finished in the last report are not
        listed again.

        Raises UserError if the root has no run, and StorageUnavailableError if it does not answer.
        """
        run = read_run(self._store)
        sums, first, shards_read = ReportSums(), list[Sample](), 0
        for digest, samples, is_new in self._digests(run, trusts_seals=running is True):
            sums.add(digest)
            shards_read += is_new
            shown = samples[: FIRST_SAMPLES - len(first)]
            first += [{**sample, "shard": digest["shard"]} for sample in shown]
        running = self.is_running() if running is None else running
        moment = Moment(
            now=time.time(),
            running=running,
            refresh_s=refresh_s if running else None,
            price_per_gpu_hour=self._files.last_price() if price_per_gpu_hour is None else price_per_gpu_hour,
        )
        events = read_events(self._store, parts=self._events)
        document = make_document(self._store.url, run, sums, events, gpus_of(run), moment)
        data, page = encode_json(document), render_page(document, first).encode("utf-8")
        self._files.write_page(data, page)
        return Update(document, data, page, shards_read)

    def is_running(self) -> bool:
        """Whether a driver is at work on the root, as far as its lease says."""
        holder = read_lease(self._store)
        return bool(holder and holder.purpose == "run" and not is_gone(holder) and not _is_silent(holder.beat_at))

    def _digests(
        self, run: Mapping[str, Any], *, trusts_seals: bool
    ) -> Iterator[tuple[dict[str, Any], Sequence[Sample], bool]]:
        """The digest of each shard in order, the samples of the first parts, and whether its records were read."""
        _, shards = plan_size(run)
        if shards > MAX_SHARDS:
            raise UserError(
                f"The run at {public_url(self._store.url)} has {shards:,} shards; a report has at most "
                f"{MAX_SHARDS:,}. `hv-batch status --shards LIST` shows some of them. For the next run, raise "
                "output.shard_size."
            )
        keys, planned = PlannedKeys(self._store, run), PlannedSamples(self._store, run)
        tables, withdrawn, gpus = SealedTables(self._store, run), all_withdrawn(self._store), gpus_of(run)

        in_root = find_shards(self._store, range(shards))

        def list_one(shard: int, size: int) -> ShardListing:
            return list_shard(self._store, shard, keys.of(shard), size, withdrawn.get(shard, frozenset()))

        def look_up(shard: int) -> _Found:
            size = shard_samples(run, shard)
            if trusts_seals and (digest := self._files.read_finished_digest(shard, size)):
                return _Found(shard, size, None, digest)
            listing = list_one(shard, size)
            if not listing.terminal:
                return _Found(shard, size, listing, empty_digest(listing, size))
            return _Found(shard, size, listing, self._files.read_digest(shard, listing.state))

        wanted, listed = FIRST_SAMPLES, frozenset(in_root)
        untouched = empty_digest(ShardListing(0, frozenset(), frozenset(), frozenset(), False, NOTHING), 0)
        looked_up = map_in_threads(look_up, in_root, SCANNERS)
        for shard in range(shards):
            if shard not in listed:
                size = shard_samples(run, shard)
                yield {**untouched, "shard": shard, "samples": size, "pending": size}, (), False
                continue
            found = next(looked_up)
            digest, shown = found.digest, list[Sample]()
            if digest and digest["part_bytes"] and wanted > 0:
                shown = self._files.read_part(found.shard) or []
                digest = digest if shown else None  # the part is missing or damaged
            is_new = digest is None
            if digest is None:
                listing = found.listing or list_one(found.shard, found.samples)
                part, digest, shown = digest_shard(self._store, listing, found.samples, planned, tables, gpus)
                self._files.write_shard(part, digest)
            wanted -= len(shown)
            yield digest, shown, is_new


def _is_silent(beat_at: str) -> bool:
    """Whether the last heartbeat of a lease is so old that no clock is wrong by that much."""
    try:
        return time.time() - datetime.fromisoformat(beat_at).timestamp() > SILENT_S
    except (ValueError, OverflowError):
        return True


def update_report(store: Store, *, price_per_gpu_hour: float | None = None, running: bool | None = None) -> Update:
    """Write the report of a root once. Raises as `Reporter.update`."""
    return Reporter(store).update(price_per_gpu_hour=price_per_gpu_hour, running=running)
