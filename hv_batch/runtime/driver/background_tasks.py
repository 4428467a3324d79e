"""The driver's own acts on the output root: quarantine records, seals, and what others ask of it.

They are done in order, between two turns of the driver's loop; shards are sealed elsewhere, in an order of their own.
Where the root does not answer, that act and all behind it wait: there is nobody else to try them again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

import ray
from ray.exceptions import RayError, RayTaskError

from hv_batch.job.failure import Failure
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.commits import quarantine, quarantine_record
from hv_batch.job.records.latents import drop_latents, drop_steps
from hv_batch.job.records.pending import CompleteShard, PendingSamples
from hv_batch.job.scheduling.messages import Event
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.runtime.classify import classify
from hv_batch.runtime.driver.outage import Outage
from hv_batch.runtime.driver.seal_task import seal
from hv_batch.runtime.run_context import RunContext
from hv_batch.runtime.worker import Watch

logger = logging.getLogger(__name__)

# Complete shards that must wait for each worker that seals, before another joins in: its start takes a second of CPU.
SHARDS_A_SEALER = 4


class BackgroundTasks:
    """`watch` takes references to wait for."""

    def __init__(
        self,
        context: RunContext,
        plan: PendingSamples,
        extra_kinds: Mapping[str, ColumnType],
        outage: Outage,
        watch: Watch,
    ) -> None:
        self._context = context
        self._plan = plan
        self._extra_kinds = extra_kinds
        self._outage = outage
        self._watch = watch
        self._waiting: deque[Callable[[], None]] = deque()
        self._to_seal: deque[CompleteShard] = deque()
        self._sealing = 0

    @property
    def has_pending(self) -> bool:
        return bool(self._waiting or self._to_seal or self._sealing)

    def add(self, act: Callable[[], None]) -> None:
        self._waiting.append(act)

    def quarantine(self, sample: Sample, failures: tuple[Failure, ...]) -> None:
        """Give the sample up, when its turn comes."""
        self.add(partial(self._quarantine, sample, failures))

    def run(self) -> None:
        """What can be done now. Raises UserError when the output root has not answered for too long."""
        while self._waiting and not self._outage.pauses(time.monotonic()):
            try:
                self._waiting[0]()
            except StorageUnavailableError as error:
                self._outage.met(error, time.monotonic())
            else:
                self._waiting.popleft()
        self._to_seal.extend(self._plan.take_complete())
        if not self._outage.pauses(time.monotonic()):
            while self._to_seal and len(self._to_seal) >= SHARDS_A_SEALER * self._sealing:
                self._seal(self._to_seal.popleft())

    def _seal(self, complete: CompleteShard) -> None:
        self._sealing += 1
        webdataset = self._context.config.output.webdataset
        ref = seal.remote(self._context.store, complete.shard, complete.keys, self._extra_kinds, webdataset)
        self._watch(ref, lambda ref: self._sealed(ref, complete))

    def _sealed(self, ref: ray.ObjectRef, complete: CompleteShard) -> list[Event]:
        self._sealing -= 1
        try:
            ray.get(ref)
            self._outage.over(time.monotonic())
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if isinstance(cause, StorageUnavailableError):
                self._to_seal.appendleft(complete)
                self._outage.met(cause, time.monotonic())
            else:
                # Nothing is lost: the records are there, and the next run of the same command seals the shard.
                logger.warning(f"a shard could not be sealed: {classify(error).message}")
        return []

    def _quarantine(self, sample: Sample, failures: tuple[Failure, ...]) -> None:
        record = quarantine_record(
            sample,
            failures=[failure.to_dict() for failure in failures],
            fingerprint=self._context.fingerprint,
            versions=self._context.versions,
        )
        given_up = quarantine(self._context.store, record)
        if given_up:
            drop_latents(self._context.store, sample.shard, sample.key)
            drop_steps(self._context.store, sample.shard, sample.key)
        self._outage.over(time.monotonic())
        if given_up:
            logger.warning(f"quarantined {sample.key} (row {sample.row}): {failures[-1].first_line}")
            self._plan.quarantined(sample)
        else:
            self._plan.committed(sample)
