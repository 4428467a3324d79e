"""What the driver itself writes into the output root: quarantine records, in an I/O thread, and seals, in Ray tasks."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from functools import partial

import ray
from ray.exceptions import RayError, RayTaskError

from hv_batch.job.failure import Failure
from hv_batch.job.formatting import plural
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.commits import quarantine, quarantine_record
from hv_batch.job.records.latents import drop_latents, drop_steps
from hv_batch.job.records.pending import CompleteShard, PendingSamples
from hv_batch.job.scheduling.messages import Event
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.runtime.classify import classify
from hv_batch.runtime.driver.io_worker import IoWorker
from hv_batch.runtime.driver.outage import Outage
from hv_batch.runtime.driver.seal_task import seal
from hv_batch.runtime.run_context import RunContext
from hv_batch.runtime.worker import Watch

logger = logging.getLogger(__name__)

# Complete shards that must wait for each worker that seals, before another is started: its start takes a second of CPU.
SHARDS_PER_SEALER = 4

LOST_NAMES = 5  # in a log line


class BackgroundTasks:
    """`watch` is the driver's; `records_io` runs acts on the output root in order."""

    def __init__(
        self,
        context: RunContext,
        pending: PendingSamples,
        extra_kinds: Mapping[str, ColumnType],
        outage: Outage,
        records_io: IoWorker,
        watch: Watch,
    ) -> None:
        self._context = context
        self._pending = pending
        self._extra_kinds = extra_kinds
        self._outage = outage
        self._records_io = records_io
        self._watch = watch
        self._to_seal: deque[CompleteShard] = deque()
        self._sealing = 0
        self.lost = 0  # committed samples whose files are missing, so that they are pending again

    @property
    def has_pending(self) -> bool:
        return bool(self._records_io.has_pending or self._to_seal or self._sealing)

    def quarantine(self, sample: Sample, failures: tuple[Failure, ...]) -> None:
        """Write the sample's quarantine record, after all acts that were submitted before."""
        self._records_io.submit(
            partial(self._quarantine, sample, failures), partial(self._quarantined, sample, failures)
        )

    def start_seals(self) -> None:
        """Seal the shards that have become complete, unless the output root does not answer."""
        self._to_seal.extend(self._pending.take_complete())
        if not self._outage.pauses(time.monotonic()):
            while self._to_seal and len(self._to_seal) >= SHARDS_PER_SEALER * self._sealing:
                self._seal(self._to_seal.popleft())

    def _seal(self, complete: CompleteShard) -> None:
        self._sealing += 1
        webdataset = self._context.config.output.webdataset
        ref = seal.remote(self._context.store, complete.shard, complete.keys, self._extra_kinds, webdataset)
        self._watch(ref, lambda ref: self._sealed(ref, complete))

    def _sealed(self, ref: ray.ObjectRef, complete: CompleteShard) -> list[Event]:
        self._sealing -= 1
        try:
            lost: tuple[str, ...] = ray.get(ref) or ()
            self._outage.note_success(time.monotonic())
            self.lost += len(lost)
            if lost:
                names = ", ".join(lost[:LOST_NAMES]) + (", ..." if len(lost) > LOST_NAMES else "")
                logger.warning(
                    f"files of {plural(len(lost), 'committed sample')} are missing in the output root, so the shard is "
                    f"not sealed and they are rendered again: {names}"
                )
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if isinstance(cause, StorageUnavailableError):
                self._to_seal.appendleft(complete)
                self._outage.note_failure(cause, time.monotonic())
            else:
                # Nothing is lost: the records are there, and the same command seals the shard the next time.
                logger.warning(f"a shard could not be sealed: {classify(error).message}")
        return []

    def _quarantine(self, sample: Sample, failures: tuple[Failure, ...]) -> bool:
        """In the I/O thread. False if the sample has been committed, which a worker may not have lived to report."""
        store = self._context.store
        record = quarantine_record(
            sample,
            failures=[failure.to_dict() for failure in failures],
            fingerprint=self._context.fingerprint,
            versions=self._context.versions,
        )
        is_quarantined = quarantine(store, record)
        if is_quarantined:
            drop_latents(store, sample.shard, sample.key)
            drop_steps(store, sample.shard, sample.key)
        return is_quarantined

    def _quarantined(self, sample: Sample, failures: tuple[Failure, ...], is_quarantined: bool) -> list[Event]:
        self._outage.note_success(time.monotonic())
        if is_quarantined:
            logger.warning(
                f"quarantined {sample.key} (row {sample.row}): {failures[-1].first_line}",
                extra={"sample": sample.key, "attempt": len(failures)},
            )
            self._pending.quarantined(sample)
        else:
            self._pending.committed(sample)
        return []
