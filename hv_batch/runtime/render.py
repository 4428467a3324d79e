"""One whole run, from a checked config to a finished output root: what `hv-batch run` and jobs/render.py call.

Everything that can be found wrong is found in `prepare_run`, before Ray is touched (P6); everything that is rendered is
found again by the same call after a crash (P2).
"""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from threading import Event
from types import FrameType
from typing import Any

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.formatting import clock
from hv_batch.job.inspection.status import read_status
from hv_batch.job.inspection.summary import aggregate, write_report
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.selection import Selection
from hv_batch.job.records.lease import Lease, hold_lease, this_process
from hv_batch.job.records.pending import PendingSamples, only_failed
from hv_batch.job.records.run_document import RunState, finish_run, open_run, read_run_config
from hv_batch.job.redaction import public_url
from hv_batch.job.scheduling.limits import OUTAGE_PAUSE_S
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.driver.loop import Driver, Outcome
from hv_batch.runtime.driver.outage import Outage
from hv_batch.runtime.nodes.resources import ResourceShortage, await_resources
from hv_batch.runtime.preflight import PreparedRun, prepare_run
from hv_batch.runtime.session import ray_session, submission_id

logger = logging.getLogger(__name__)


class ExitCode(IntEnum):
    COMMITTED = 0
    FATAL = 1
    QUARANTINED = 3
    STOPPED = 143


def render(
    config: RunConfig,
    manifest_urls: str | Sequence[str],
    output_url: str,
    *,
    selection: Selection | None = None,
    address: str | None,
    steal: bool = False,
    stopped: Event | None = None,
    failed_only: bool = False,
) -> ExitCode:
    """Render what `output_url` lacks of the manifest, or of a selection of it; `failed_only` what was given up there.

    While another driver is writing there this is refused, unless `steal` makes that one stop. `stopped` may be set by
    anybody to end the run after a drain; SIGTERM and SIGINT set it, too. Raises UserError, which means exit code 1.
    """
    with _stop_signals(stopped) as stopped, tempfile.TemporaryDirectory(prefix="hv_batch-plan-") as spool:
        try:
            store = Store(output_url)
            if failed_only:
                selection = only_failed(store, selection or Selection())
                if not selection.failed:
                    logger.info(f"nothing to render: no such sample of {public_url(store.url)} was given up")
                    return ExitCode.COMMITTED
            job = prepare_run(config, Manifest(manifest_urls), store, Store(spool), selection)
            return _render(job, address, stopped, steal)
        except KeyboardInterrupt:
            logger.info("stopped at once; run the same command again to go on")
            return ExitCode.STOPPED
        except OSError as error:  # a store that went away, a disk that is full: nothing of ours is broken
            raise UserError(
                f"{error}. What is committed stays; mend this and run the same command again to go on."
            ) from error


def _render(job: PreparedRun, address: str | None, stopped: Event, steal: bool) -> ExitCode:
    store = job.context.store
    if job.state is RunState.FINISHED and not job.plan.takes_back:
        logger.info(f"nothing to render: all {job.index.summary.samples} samples of {public_url(store.url)} are done")
        return _exit_code(json.loads(store.get(layout.SUMMARY)))
    me = this_process("run", submission_id())
    # Held before Ray is asked for anything: a second driver would wait for GPUs that the first one has.
    with hold_lease(store, me, steal=steal, wait=stopped.wait) as lease:
        if lease is None:
            logger.info("stopped while waiting for the output root; nothing was begun")
            return ExitCode.STOPPED
        return _render_pending(job, address, stopped, lease)


def _render_pending(job: PreparedRun, address: str | None, stopped: Event, lease: Lease) -> ExitCode:
    config, store, plan = job.context.config, job.context.store, job.plan
    run = job.context.run

    def should_stop() -> bool:
        lease.check()  # raises where the root is another driver's now: a drain would only render what that one renders
        return stopped.is_set()

    logger.info("resuming an unfinished run; starting Ray" if job.state is RunState.RESUMED else "starting Ray")
    kinds = job.index.summary.extra_kinds
    with ray_session(run, address) as local, _stop_signals(stopped):
        patience_s = 0.0 if local else config.timeouts.start_s
        shortage = ResourceShortage(run, patience_s=patience_s)
        if not await_resources(shortage, should_stop):
            logger.info("stopped while waiting for nodes; nothing was begun")
            return ExitCode.STOPPED
        # Only now is the root claimed: whoever asked for more than there is may ask for something else.
        open_run(store, job.document)
        job.index.publish(store)
        if plan.takes_back:
            logger.info(f"taken back of the quarantine: {plan.take_back()} samples")
        driver = Driver(job.context, plan, plan.total, kinds, shortage, should_stop)
        if job.state is RunState.RESUMED:
            driver.commit_spooled()
        outcome = driver.run()
    lease.check()
    return _close(store, plan, outcome, stopped)


def _close(store: Store, plan: PendingSamples, outcome: Outcome, stopped: Event) -> ExitCode:
    counts = plan.counts
    found = counts.committed_before + counts.quarantined_before
    told = f"{counts.committed} rendered, {counts.quarantined} quarantined now, {found} were done before"
    if outcome.drained:
        # No summary: reading every record of a large run would outlast the patience of whoever sent the signal.
        logger.info(f"stopped after {clock(outcome.seconds)}: {told}; run the same command again to go on")
        return ExitCode.STOPPED
    timing = {"loop_max_s": outcome.loop_max_s}
    if not plan.is_whole and (left := read_status(store).pending):
        # Nothing is summed up: that is for the command which renders the last sample.
        logger.info(
            f"finished the selection after {clock(outcome.seconds)}: {told}; {left} samples outside it are left",
            extra=timing,
        )
        return ExitCode.QUARANTINED if counts.quarantined_before + counts.quarantined else ExitCode.COMMITTED
    # Of this command alone, unlike the rest of the summary: a resume may run on other nodes.
    own = {"excluded_nodes": dict(outcome.excluded_nodes), "groups_lost": outcome.losses.to_dict()}
    summary = _finish(store, own, Outage(), stopped)
    logger.info(f"finished after {clock(outcome.seconds)}: {told}", extra=timing)
    if groups := outcome.losses.describe():
        logger.info(f"denoise groups lost on the way: {groups}")
    if pending := summary["pending"]:
        raise UserError(
            f"{pending} samples that were rendered have no record in {public_url(store.url)}. Either somebody removes "
            "objects there, or the actors write to another place than this driver reads. Mend that and run again."
        )
    if unsealed := summary["shards"] - summary["shards_sealed"]:
        raise UserError(
            f"Every sample of {public_url(store.url)} is done, but {unsealed} shard(s) could not be sealed, as said "
            "above. Run the same command again: it seals them and renders nothing."
        )
    return _exit_code(summary)


def _finish(store: Store, own: Mapping[str, Any], outage: Outage, stopped: Event) -> dict[str, Any]:
    """Write summary, report and seal, however often it takes; `own` are facts that no record holds.

    Raises KeyboardInterrupt when stopped while it waits.
    """
    while True:
        try:
            summary = {**aggregate(store), **own}
            write_report(store, summary)
            finish_run(store, summary)
            return summary
        except StorageUnavailableError as error:
            outage.note_failure(error, time.monotonic())
            if stopped.wait(OUTAGE_PAUSE_S):
                raise KeyboardInterrupt from error


def _exit_code(summary: dict[str, Any]) -> ExitCode:
    return ExitCode.QUARANTINED if summary["quarantined"] else ExitCode.COMMITTED


@contextmanager
def _stop_signals(stopped: Event | None = None) -> Iterator[Event]:
    """SIGTERM and SIGINT set the event: a handler does nothing else. A second one ends the process at once.

    Used again after `ray.init`, which installs handlers of its own.
    """
    stopped = stopped or Event()

    def request(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume(
    output: str,
    *,
    address: str | None,
    manifest: str | None = None,
    selection: Selection | None = None,
    steal: bool = False,
    stopped: Event | None = None,
) -> ExitCode:
    """Render what is left of the run at `output`, or of a selection of it, with the config and the manifest it was
    begun with.

    `manifest` is where the same manifest is now, should it have moved; `steal` as in `render`. Raises UserError when
    there is no run, or its run.json does not hold everything.
    """
    config, recorded = read_run_config(output)
    urls = manifest or recorded
    return render(config, urls, output, selection=selection, address=address, steal=steal, stopped=stopped)
