"""Serves the report of a root, and keeps it current while a driver is at work there."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Iterator

from hv_batch.job.report.server.http import ReportServer
from hv_batch.job.report.server.objects import ServedRoot
from hv_batch.job.report.update import Reporter
from hv_batch.job.storage.errors import StorageBrokenError, StorageRefusedError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

REFRESH_S = 20  # of the report and of an open page
POLL_S = 0.05  # until a server that is to end notices it
MAX_LOAD = 0.2  # the share of the time that updates may take

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def serve_report(store: Store, port: int = 0, price_per_gpu_hour: float | None = None) -> Iterator[ReportServer]:
    """A server that answers in a thread of its own for the duration of a `with` statement.

    The report is written to the root only if no driver is at work there, because a driver writes it itself, and if the
    root may be written; otherwise to a temporary folder. Raises UserError if the root has no run or the port is in use.
    """
    with tempfile.TemporaryDirectory(prefix="hv_batch_report_") as folder:
        reporter, target = Reporter(store, own := Store(folder)), own
        if not reporter.is_running():
            with contextlib.suppress(StorageRefusedError, StorageBrokenError):
                Reporter(store).update(price_per_gpu_hour=price_per_gpu_hour, running=False)
        update = reporter.update(price_per_gpu_hour=price_per_gpu_hour, refresh_s=REFRESH_S)
        root = ServedRoot(store, target, update)
        try:
            server = ReportServer(root, port)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"The report cannot be served on port {port}: {error}. Choose another with --port, or any free port "
                "with --port 0."
            ) from error
        stopped = threading.Event()
        threads = [
            threading.Thread(target=server.serve_forever, args=(POLL_S,), name="report-server"),
            threading.Thread(target=_keep_current, args=(reporter, root, stopped), name="report-update", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            yield server
        finally:
            stopped.set()
            server.shutdown()
            server.server_close()
            threads[0].join()


def _keep_current(reporter: Reporter, root: ServedRoot, stopped: threading.Event) -> None:
    """Update the report while a driver is at work, and once more when it has ended."""
    pause_s = float(REFRESH_S)
    while not stopped.wait(pause_s):
        begun = time.monotonic()
        try:
            if reporter.is_running() or root.update.document["running"]:
                root.update = reporter.update(refresh_s=REFRESH_S)
        except (OSError, UserError) as error:
            logger.warning(f"the report could not be updated: {error}")
        pause_s = max(REFRESH_S, (time.monotonic() - begun) / MAX_LOAD)
