"""One whole run, from a validated config to a finished output root: `hv-batch run` and jobs/render.py call `render`.

`prepare_run` makes every check that needs no cluster before Ray is started (P6). After a crash the same call resumes
the run (P2).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Event

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.dataset.card import write_card
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.selection import Selection
from hv_batch.job.records.continuation import begin_run
from hv_batch.job.records.lease import Lease, LeaseLostError, hold_lease
from hv_batch.job.records.lease_holder import this_process
from hv_batch.job.records.pending import PendingSamples, only_failed
from hv_batch.job.records.run_document import RunState, read_run, read_run_config, read_summary
from hv_batch.job.records.shard_scan import has_commits
from hv_batch.job.redaction import public_url
from hv_batch.job.scheduling.limits import OUTAGE_LIMIT_S
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.driver.loop import Driver
from hv_batch.runtime.nodes.autoscaler import REMEDY, ignores_labels
from hv_batch.runtime.nodes.code_check import check_code
from hv_batch.runtime.nodes.resources import ResourceShortage, alive_nodes, await_resources
from hv_batch.runtime.preflight import PreparedRun, prepare_run
from hv_batch.runtime.ray_contact import contact_cluster, resolve_address
from hv_batch.runtime.run_end import ExitCode, close_run, exit_code_of, reporting_failure, write_summary_again
from hv_batch.runtime.run_limits import GpuMeter, RunLimits, check_gpu_hours, stop_in_time
from hv_batch.runtime.session import Session, ray_session, submission_id
from hv_batch.runtime.stop_signals import StopSignals

logger = logging.getLogger(__name__)


# How often samples whose files the output root has lost are rendered again. A store that loses more is broken.
MAX_RENDERS_OF_LOST = 2


NO_LIMITS = RunLimits()


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
    resumed: bool = False,
    limits: RunLimits = NO_LIMITS,
    allow_change: Collection[str] = (),
) -> ExitCode:
    """Render the samples of the manifest, or of a selection of it, that have no record in `output_url`.

    `failed_only` renders only the quarantined samples of the selection. `resumed` says that config and manifest are
    those of the root's run.json: then the manifest is read only if its copy in the root is not complete. `allow_change`
    are keys of the identity that may differ from those of the root, as dotted paths: pending samples are rendered with
    the new values.

    While another driver holds the output root, the run is refused; with `steal` it takes the root over and the other
    driver stops. If `stopped` is set, the run drains and ends; the stop signals and `limits` set it as well. Raises
    UserError for every error that the user can fix (exit code 1).
    """
    stop = StopSignals(stopped)
    in_time = stop_in_time(limits.until, config.timeouts.drain_s, stop.stopped)
    try:
        with stop.handled(), in_time, tempfile.TemporaryDirectory(prefix="hv_batch-plan-") as spool:
            store = Store(output_url, stopped=stop.stopped)
            with stop.interruptible():
                stop.check()
                if failed_only:
                    selection = only_failed(store, selection or Selection())
                    if not selection.failed:
                        logger.info(f"nothing to render: no such sample of {public_url(store.url)} is quarantined")
                        return ExitCode.COMMITTED
                job = prepare_run(
                    *(config, Manifest(manifest_urls), store, Store(spool), selection, address),
                    resumed=resumed,
                    allow_change=allow_change,
                )
            return _render(job, address, stop, steal, limits)
    except KeyboardInterrupt:
        logger.info("stopped at once; run the same command again to resume")
        return ExitCode.STOPPED
    except OSError as error:  # an unreachable store or a full disk: the user can fix these
        if isinstance(error, StorageUnavailableError) and stop.stopped.is_set():
            logger.info(f"stopped while the output root did not answer; run the same command again to resume: {error}")
            return ExitCode.STOPPED
        raise UserError(
            f"{error}. Committed samples are safe; fix this and run the same command again to resume."
        ) from error


def _render(job: PreparedRun, address: str | None, stop: StopSignals, steal: bool, limits: RunLimits) -> ExitCode:
    store = job.context.store
    if job.state is RunState.FINISHED and not job.pending.takes_back:
        logger.info(f"nothing to render: all {job.index.summary.samples} samples of {public_url(store.url)} are done")
        summary = read_summary(store) or write_summary_again(store, stop)
        if not store.exists(layout.CARD):  # it was removed, or the root is that of a version without cards
            with suppress(OSError):  # a finished root may be readable only
                write_card(store, read_run(store), aggregate(store))
        logger.info(f"report: {public_url(store.url)}/{layout.REPORT}")
        return exit_code_of(summary)
    run, drain_s = job.context.run, job.context.config.timeouts.drain_s
    check_gpu_hours(limits, run.groups.largest.world_size * run.rank_gpus, drain_s)
    with stop.interruptible():
        stop.check()
        contact_cluster(resolve_address(address))
    me = this_process("run", submission_id())
    # The lease is taken before Ray is used: otherwise a second driver would wait for the GPUs of the first one.
    with hold_lease(store, me, steal=steal, wait=stop.stopped.wait, silence_s=OUTAGE_LIMIT_S) as lease:
        if lease is None:
            logger.info("stopped while waiting for the output root; nothing was started")
            return ExitCode.STOPPED
        held = replace(job, context=replace(job.context, lease_token=me.token))
        return _render_pending(held, address, stop, lease, limits)


def _render_pending(
    job: PreparedRun, address: str | None, stop: StopSignals, lease: Lease, limits: RunLimits
) -> ExitCode:
    config, store, pending = job.context.config, job.context.store, job.pending
    run = job.context.run
    meter = GpuMeter(limits.gpu_hours, config.timeouts.drain_s)

    def should_stop() -> bool:
        lease.check()  # raises if another driver has taken the root over: a drain would render samples twice
        if meter.is_spent and not stop.stopped.is_set():
            logger.info(f"the limit of {limits.gpu_hours:g} GPU hours is near: no new samples are started")
            stop.stopped.set()
        return stop.stopped.is_set()

    logger.info("resuming an unfinished run; starting Ray" if job.state is RunState.RESUMED else "starting Ray")
    kinds = job.index.summary.extra_kinds
    with _removing_drafts(store, pending, lease), ray_session(run, address, stop) as ray, _naming_logs(ray, store):
        if ray.metrics:
            logger.info(f"metrics for Prometheus: {ray.metrics}")
        if not ray.is_local and ignores_labels():
            logger.warning(
                "the autoscaler of this cluster is version 1, which ignores label selectors: if the run excludes a "
                f"node, it may add no other node in its place. {REMEDY}"
            )
        shortage = ResourceShortage(run, timeout_s=0.0 if ray.is_local else config.timeouts.start_s)
        if not await_resources(shortage, should_stop):
            logger.info("stopped while waiting for nodes; nothing was started")
            return ExitCode.STOPPED
        check_code(alive_nodes())
        # The root gets its run.json only now, so that a config that asks for too much can still be changed.
        begin_run(store, job.document, job.index, job.continuation)
        if store.exists(layout.REPORT):
            logger.info(
                f"report so far: {public_url(store.url)}/{layout.REPORT}; it is written again every few minutes"
            )
        if pending.takes_back:
            logger.info(f"released from quarantine: {pending.take_back()} samples")
        driver = Driver(job.context, pending, pending.total, kinds, shortage, meter, should_stop)
        if job.state is RunState.RESUMED:
            driver.commit_spooled()
            if has_commits(store, job.index.shards):
                driver.note_commits()
        with reporting_failure(store, stop):
            outcome = driver.run()
            for _ in range(MAX_RENDERS_OF_LOST):
                if not outcome.lost or outcome.drained:
                    break
                pending = pending.again()
                outcome = Driver(job.context, pending, pending.total, kinds, shortage, meter, should_stop).run()
    lease.check()
    if meter.hours:
        logger.info(f"the workers of this command have reserved {meter.hours:.2f} GPU hours")
    return close_run(store, pending, outcome, stop)


@contextmanager
def _naming_logs(session: Session, store: Store) -> Iterator[None]:
    """At the end, however it comes, log where its causes can be read."""
    try:
        yield
    finally:
        where = session.logs if session.is_local else f"{session.logs} on each node"
        logger.info(f"logs of the actors: {where} (worker-*.err); state: hv-batch status {public_url(store.url)}")


@contextmanager
def _removing_drafts(store: Store, pending: PendingSamples, lease: Lease) -> Iterator[None]:
    """At the end, remove what killed workers have left half written, unless another process works there by now."""
    try:
        yield
    finally:
        with suppress(OSError, LeaseLostError):
            lease.check()
            store.remove_drafts(layout.folders(sorted(pending.unfinished)))


def resume(
    output: str,
    *,
    address: str | None,
    manifest: str | None = None,
    selection: Selection | None = None,
    steal: bool = False,
    stopped: Event | None = None,
    engines: Collection[str] = (),
    hooks: Collection[str] = (),
    limits: RunLimits = NO_LIMITS,
) -> ExitCode:
    """Resume the run at `output`, or a selection of it, with the config and the manifest recorded in its run.json.

    The manifest is read only if its copy in the root is not complete, or if `manifest` gives its new location. `steal`,
    `stopped` and `limits` as in `render`. `engines` and `hooks` are those that the operator names. Raises UserError if
    there is no run, if its run.json is incomplete, or if it names an unknown engine or a hook that is not named here.
    """
    config, recorded = read_run_config(output, engines, hooks)
    return render(
        config,
        manifest or recorded,
        output,
        selection=selection,
        address=address,
        steal=steal,
        stopped=stopped,
        resumed=manifest is None,
        limits=limits,
    )


def check_resume(output: str, *, engines: Collection[str] = (), hooks: Collection[str] = ()) -> None:
    """Make every check of `resume` that needs no cluster. Changes nothing except for the probe of the output root.

    Raises UserError if the run could not be resumed: for a changed config or manifest, missing weights and the like.
    """
    config, urls = read_run_config(output, engines, hooks)
    with tempfile.TemporaryDirectory(prefix="hv_batch-plan-") as folder:
        prepare_run(config, Manifest(urls), Store(output), Store(folder), None, resumed=True)
