"""Writes the report of a run every few minutes, in a Ray task.

A process of its own, because reading records takes processor time that the driver's loop needs. The report keeps what
it has read in the output root (`hv_batch.job.report`), so each task reads only what has changed since the last one.
"""

from __future__ import annotations

import logging
import time

import ray
from ray.exceptions import RayError

from hv_batch.job import layout
from hv_batch.job.records.lease import refuse_other_holder
from hv_batch.job.redaction import public_url
from hv_batch.job.report.update import update_report
from hv_batch.job.scheduling.messages import Event
from hv_batch.job.storage.store import Store
from hv_batch.runtime.classify import classify
from hv_batch.runtime.driver.outage import Outage
from hv_batch.runtime.run_context import RunContext
from hv_batch.runtime.worker import Watch

logger = logging.getLogger(__name__)

FIRST_S = 60.0  # from the start of the run: workers load before that
EVERY_S = 300.0
MAX_SHARE = 0.1  # of the time: a report that takes two minutes is written every twenty


@ray.remote(num_cpus=0, max_retries=0)
def write_report(store: Store, lease_token: str) -> None:
    if lease_token:
        refuse_other_holder(store, lease_token)
    update_report(store, running=True)


class ReportTask:
    """`watch` is the driver's. A report that cannot be written is logged once and tried again; it never fails a run."""

    def __init__(self, context: RunContext, watch: Watch, outage: Outage) -> None:
        self._context = context
        self._watch = watch
        self._outage = outage
        self._task: ray.ObjectRef | None = None
        self._begun = 0.0
        self._due_at = time.monotonic() + FIRST_S
        self._is_written = False
        self._last_problem = ""

    def poll(self, now: float) -> None:
        """Start a task if one is due, none is running and the output root answers."""
        if self._task is None and now >= self._due_at and not self._outage.pauses(now):
            self._begun = now
            self._task = write_report.remote(self._context.store, self._context.lease_token)
            self._watch(self._task, self._written)

    def close(self) -> None:
        """End the task that is running, so that it does not overwrite the report of the end of the run."""
        if self._task is not None:
            ray.cancel(self._task, force=True)

    def _written(self, ref: ray.ObjectRef) -> list[Event]:
        now = time.monotonic()
        self._task = None
        self._due_at = now + max(EVERY_S, (now - self._begun) / MAX_SHARE)
        try:
            ray.get(ref)
        except RayError as error:
            problem = classify(error, "the report").first_line
            if problem != self._last_problem:
                logger.warning(f"the report could not be written, and is tried again in some minutes: {problem}")
            self._last_problem = problem
        else:
            self._last_problem = ""
            if not self._is_written:
                self._is_written = True
                logger.info(f"report so far: {public_url(self._context.store.url)}/{layout.REPORT}")
        return []
