"""The report at the end of a command costs a stopped process a moment and never fails a run."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest

from hv_batch.job import layout
from hv_batch.job.records.lease import LeaseLostError
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime import run_end
from hv_batch.runtime.run_end import reporting_failure, update_or_warn, write_last_report
from hv_batch.runtime.stop_signals import StopSignals
from tests.support.small_runs import run_small, some_samples

DEADLINE_S = 60


@pytest.fixture
def stop():
    return StopSignals()


@pytest.fixture
def slow(monkeypatch):
    """`update_report` takes until the event is set."""
    release = threading.Event()
    monkeypatch.setattr(run_end, "update_report", lambda *_, **__: release.wait(DEADLINE_S))
    yield release
    release.set()


def test_a_selection_ends_with_a_report(tmp_path, stop, caplog):
    """A root with pending samples has a report that says so."""
    store = Store(str(tmp_path))
    run_small(store, some_samples(4))
    store.delete(layout.REPORT)
    store.delete(layout.SUCCESS)
    store.delete(layout.commit_key(0, "s001"))
    with caplog.at_level(logging.INFO):
        write_last_report(store, stop)
    assert caplog.messages == [f"report: {store.url}/{layout.REPORT}"]
    document = json.loads(store.get("report/report.json"))
    assert (document["running"], document["totals"]["pending"]) == (False, 1)


@pytest.mark.parametrize("was_stopped", [False, True])
def test_a_stop_does_not_wait_for_a_long_report(tmp_path, stop, slow, was_stopped, monkeypatch, caplog):
    """P2: a stopped process may be killed at any moment; `hv-batch report` writes what is missing."""
    monkeypatch.setattr(run_end, "REPORT_S", 0.2)
    if was_stopped:
        stop.stopped.set()
    else:
        threading.Timer(0.2, stop.stopped.set).start()
    begun = time.monotonic()
    with caplog.at_level(logging.INFO):
        write_last_report(Store(str(tmp_path)), stop)
    assert time.monotonic() - begun < DEADLINE_S / 4
    assert "is not complete yet" in caplog.text


@pytest.mark.parametrize("error", [ValueError("a bug"), StorageUnavailableError("503"), PermissionError("403")])
def test_an_error_is_a_warning(tmp_path, stop, monkeypatch, caplog, error):
    """Whatever goes wrong, the run has ended as it would have without a report."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(run_end, "update_report", fail)
    write_last_report(Store(str(tmp_path)), stop)
    assert f"the report could not be written: {error}" in caplog.text
    if isinstance(error, StorageUnavailableError):  # the end of a run waits for the store anyway
        with pytest.raises(StorageUnavailableError):
            update_or_warn(Store(str(tmp_path)))
    else:
        update_or_warn(Store(str(tmp_path)))


def test_a_run_that_fails_leaves_a_report(tmp_path, stop):
    """P5: the page shows the causes; a driver that has lost the root to another one writes nothing."""
    store = Store(str(tmp_path))
    run_small(store, some_samples(4))
    store.delete(layout.REPORT)
    with pytest.raises(LeaseLostError), reporting_failure(store, stop):
        raise LeaseLostError("taken over")
    assert not store.exists(layout.REPORT)
    with pytest.raises(UserError, match="cannot go on"), reporting_failure(store, stop):
        raise UserError("The run cannot go on")
    assert store.exists(layout.REPORT)
