"""The end of a run: its exit code, its last log lines, and the summary, report and `_SUCCESS` of a finished root."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from hv_batch.job import layout
from hv_batch.job.dataset.card import write_card
from hv_batch.job.formatting import clock
from hv_batch.job.inspection.status import read_status
from hv_batch.job.inspection.summary import aggregate, describe_truncated
from hv_batch.job.records.lease import LeaseLostError
from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.records.run_document import finish_run, read_run
from hv_batch.job.redaction import public_url
from hv_batch.job.report.update import update_report
from hv_batch.job.scheduling.limits import OUTAGE_PAUSE_S
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.driver.loop import Outcome
from hv_batch.runtime.driver.outage import Outage
from hv_batch.runtime.stop_signals import StopSignals

logger = logging.getLogger(__name__)

# How long a command that was stopped or has failed works on its report. Most of it is there already, and a process that
# was asked to end may be killed at any moment.
REPORT_S = 10.0
POLL_S = 0.2


class ExitCode(IntEnum):
    COMMITTED = 0
    FATAL = 1
    QUARANTINED = 3
    HELD = 4  # of the nightly job: another driver is rendering this date
    STOPPED = 143


# The words for the exit codes, from best to worst: a failed run needs attention, a stopped one is resumed by its
# command, and another driver is rendering a held one at this moment.
OUTCOMES = {
    ExitCode.COMMITTED: "committed",
    ExitCode.QUARANTINED: "quarantined",
    ExitCode.STOPPED: "stopped",
    ExitCode.HELD: "held",
    ExitCode.FATAL: "failed",
}


def close_run(store: Store, pending: PendingSamples, outcome: Outcome, stop: StopSignals) -> ExitCode:
    """Log how the run ended, and finish the output root if nothing is left to do in it.

    Raises UserError if records or seals are missing although every sample was rendered.
    """
    counts = pending.counts
    done_before = counts.committed_before + counts.quarantined_before
    totals = f"{counts.committed} rendered, {counts.quarantined} quarantined now, {done_before} were done before"
    if outcome.drained:
        # No summary, because reading every record of a large run takes longer than a stopped process may live.
        write_last_report(store, stop)
        logger.info(f"stopped after {clock(outcome.seconds)}: {totals}; run the same command again to resume")
        return ExitCode.STOPPED
    timing = {"loop_max_s": outcome.loop_max_s}
    if not pending.is_whole and (left := read_status(store).pending):
        # No summary: the command that renders the last sample writes it.
        logger.info(
            f"finished the selection after {clock(outcome.seconds)}: {totals}; {left} samples outside it are pending",
            extra=timing,
        )
        write_last_report(store, stop)
        return ExitCode.QUARANTINED if counts.quarantined_before + counts.quarantined else ExitCode.COMMITTED
    # These facts are about this command only, unlike the rest of the summary: a resume may run on other nodes.
    own = {"excluded_nodes": dict(outcome.excluded_nodes), "groups_lost": outcome.losses.to_dict()}
    summary = _finish(store, own, Outage(), stop)
    logger.info(f"finished after {clock(outcome.seconds)}: {totals}", extra=timing)
    logger.info(f"report: {public_url(store.url)}/{layout.REPORT}")
    if cut := describe_truncated(summary):
        logger.warning(cut)
    if groups := outcome.losses.describe():
        logger.info(f"denoise groups lost during the run: {groups}")
    if left := summary["pending"]:
        raise UserError(
            f"{left} samples that were rendered have no record in {public_url(store.url)}. Either another process "
            "removes objects there, or the store loses what it has confirmed, or the actors write to a place that this "
            "driver does not read. Fix that and run the same command again."
        )
    if unsealed := summary["shards"] - summary["shards_sealed"]:
        raise UserError(
            f"Every sample of {public_url(store.url)} is done, but {unsealed} shard(s) could not be sealed; the "
            "warnings above give the reasons. Run the same command again: it seals them and renders nothing."
        )
    return exit_code_of(summary)


def _finish(store: Store, own: Mapping[str, Any], outage: Outage, stop: StopSignals) -> dict[str, Any]:
    """Write summary, report, card and _SUCCESS; retry while the output root does not answer. Returns the summary.

    `own` are facts that no record holds. Raises KeyboardInterrupt if a stop is requested: reading every record of a
    large run takes longer than a stopped process may live, and the next command writes what is missing.
    """
    while True:
        try:
            with stop.interruptible():
                summary = {**aggregate(store), **own}
                update_or_warn(store)
                write_card(store, read_run(store), summary)
            finish_run(store, summary)
            return summary
        except StorageUnavailableError as error:
            outage.note_failure(error, time.monotonic())
            if stop.stopped.wait(OUTAGE_PAUSE_S):
                raise KeyboardInterrupt from error


def update_or_warn(store: Store) -> None:
    """Write the report of a run that has ended. Raises StorageUnavailableError; any other error becomes a warning."""
    try:
        update_report(store, running=False)
    except StorageUnavailableError:
        raise
    except Exception as error:  # noqa: BLE001  (a page must not fail a run)
        logger.warning(f"the report could not be written: {error}; `hv-batch report` writes it")


@contextmanager
def reporting_failure(store: Store, stop: StopSignals) -> Iterator[None]:
    """If the block raises the error with which a run ends, write the report, which shows the causes.

    Nothing is written after another process has taken the root over.
    """
    try:
        yield
    except LeaseLostError:
        raise
    except UserError:
        write_last_report(store, stop, within_s=REPORT_S)
        raise


def write_last_report(store: Store, stop: StopSignals, *, within_s: float = math.inf) -> None:
    """Write the report and log its location: for `within_s` at most, until a stop is requested, or for REPORT_S if one
    was requested before.

    What is not finished by then is left to `hv-batch report` or to the next command. Raises nothing.
    """
    errors: list[Exception] = []

    def write() -> None:
        try:
            update_report(store, running=False)
        except Exception as error:  # noqa: BLE001  (reported below)
            errors.append(error)

    # A daemon: if it is not finished in time, it ends with the process. Each object is whole at any moment.
    thread = threading.Thread(target=write, name="report", daemon=True)
    was_stopped = stop.stopped.is_set()
    deadline = time.monotonic() + min(within_s, REPORT_S if was_stopped else math.inf)
    thread.start()
    while thread.is_alive() and time.monotonic() < deadline and stop.stopped.is_set() == was_stopped:
        thread.join(POLL_S)
    url = public_url(store.url)
    if thread.is_alive():
        logger.info(f"the report is not complete yet; `hv-batch report {url}` writes the rest")
    elif errors:
        logger.warning(f"the report could not be written: {errors[0]}; `hv-batch report {url}` writes it")
    else:
        logger.info(f"report: {url}/{layout.REPORT}")


def write_summary_again(store: Store, stop: StopSignals) -> dict[str, Any]:
    """The summary of a finished run that has lost it. It depends on the records only. Raises UserError as `resume`."""
    logger.warning(f"{layout.SUMMARY} of {public_url(store.url)} is missing or damaged; it is written again")
    summary = _finish(store, {}, Outage(), stop)
    if summary["pending"] or summary["shards_sealed"] < summary["shards"]:
        raise UserError(
            f"{public_url(store.url)} is marked as finished, but {summary['pending']:,} of its samples are pending or "
            "some of its shards are not sealed. Run `hv-batch verify --repair`: it renders and seals what is missing."
        )
    return summary


def exit_code_of(summary: dict[str, Any]) -> ExitCode:
    return ExitCode.QUARANTINED if summary["quarantined"] else ExitCode.COMMITTED
