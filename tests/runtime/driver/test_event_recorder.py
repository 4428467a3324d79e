"""The events of a driver never delay its loop, and survive an outage of the output root."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from hv_batch.job import layout
from hv_batch.job.event_log.reader import read_events
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.progress import Snapshot
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.job.storage.errors import StorageRefusedError, StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.runtime.driver import event_recorder
from hv_batch.runtime.driver.event_recorder import EventRecorder

GROUP, POOL = WorkerId(Stage.DENOISE, 0, 0), WorkerId(Stage.DECODE, 1, 2)
SNAPSHOT = Snapshot(
    total=10, committed=2, quarantined=1, done_before=0, starting=1, encoding=0, denoising=1, decoding=0
)
DEADLINE_S = 60


class Cluster:
    """Stands for the view of a Ray cluster."""

    def __init__(self) -> None:
        self.addresses = {"a" * 56: "10.0.0.1"}
        self.leaving: dict[str, float] = {}

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {node: {"NodeManagerAddress": address} for node, address in self.addresses.items()}

    def draining(self) -> dict[str, float]:
        return self.leaving


class FaultyStore(Store):
    """A real store that first raises the errors of `faults`, and does not answer while `hangs` is set."""

    faults: list[Exception]
    hangs: threading.Event

    def put_new(self, key: str, data: bytes) -> bool:
        while self.hangs.is_set():
            time.sleep(0.01)
        created = super().put_new(key, data)
        if self.faults:
            raise self.faults.pop(0)  # the write has arrived, and its answer is lost
        return created


@pytest.fixture
def store(tmp_path):
    store = FaultyStore(str(tmp_path))
    store.faults, store.hangs = [], threading.Event()
    yield store
    store.hangs.clear()


@pytest.fixture
def cluster():
    return Cluster()


@pytest.fixture
def recorder(store, cluster):
    return EventRecorder(store, cluster, lambda: {"node 10.0.0.9 (bbbbbbbb)": "its device fails"}, lambda: False)


def kinds(store) -> list[str]:
    (driver,) = read_events(store)
    return [event["kind"] for event in driver.events]


def poll_until(recorder, condition) -> None:
    """Poll as the loop does, on a clock that runs a hundred times as fast."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < DEADLINE_S
        recorder.poll(SNAPSHOT, begun + 100 * (time.monotonic() - begun))
        time.sleep(0.01)


def test_what_happens_to_workers_and_nodes(store, cluster, recorder):
    """Design 4: a worker from its request to its end with its nodes and GPUs, the nodes, and the samples."""
    recorder.started(SNAPSHOT)
    recorder.worker_asked(GROUP, 8)
    recorder.worker_asked(POOL, 0.5)
    recorder.worker_placed(GROUP, ["a" * 56])
    recorder.worker_ready(GROUP, ["a" * 56])
    recorder.task_ended(GROUP, time.monotonic() - 5, 2, failed=False)
    recorder.task_ended(GROUP, time.monotonic() - 1, 1, failed=True)
    recorder.poll(SNAPSHOT, time.monotonic())
    cluster.addresses["c" * 56], cluster.leaving["a" * 56] = "10.0.0.3", time.monotonic()
    recorder.poll(SNAPSHOT, time.monotonic() + 2)
    del cluster.addresses["a" * 56]
    recorder.worker_lost(GROUP, Failure(FailureClass.PREEMPTED, "its node is gone\nmore"))
    recorder.worker_released(POOL, "not needed")
    recorder.poll(SNAPSHOT, time.monotonic() + 4)
    recorder.drain_started()
    recorder.end("stopped")
    recorder.close()
    (driver,) = read_events(store)
    found = {event["kind"]: event for event in driver.events}
    facts = {"worker": "denoise-0.0", "stage": "denoise", "gpus": 8.0, "nodes": ["10.0.0.1 (aaaaaaaa)"]}
    assert found["worker_ready"].items() >= facts.items()
    assert found["worker_lost"].items() >= (facts | {"class": "PREEMPTED", "message": "its node is gone"}).items()
    assert found["worker_work"].items() >= (facts | {"samples": 3, "failed": 1}).items()
    assert found["worker_work"]["seconds"] == pytest.approx(6, abs=0.5)
    assert found["worker_released"]["worker"] == "decode-1.2"
    assert found["node_joined"]["node"] == "10.0.0.3 (cccccccc)"
    assert found["node_draining"]["node"] == found["node_left"]["node"] == "10.0.0.1 (aaaaaaaa)"
    assert found["node_excluded"].items() >= {"node": "10.0.0.9 (bbbbbbbb)", "message": "its device fails"}.items()
    assert found["progress"].items() >= {"committed": 2, "quarantined": 1, "pending": 7, "denoising": 1}.items()
    assert [event["kind"] for event in driver.events][-3:] == ["progress", "drain_ended", "run_ended"]
    assert all(abs(event["at"] - time.time()) < DEADLINE_S for event in driver.events)


def test_an_outage_costs_no_event(store, recorder):
    """P5: a write that fails is repeated, also if it has arrived, and the outage is among the events."""
    store.faults = [StorageUnavailableError("503"), StorageUnavailableError("503")]
    recorder.started(SNAPSHOT)
    poll_until(recorder, lambda: not store.faults)
    recorder.worker_asked(GROUP, 1)
    poll_until(recorder, lambda: "outage_ended" in kinds(store))
    recorder.end("finished")
    recorder.close()
    found = [kind for kind in kinds(store) if kind not in ("progress", "node_excluded")]
    assert found == ["run_started", "outage_started", "worker_asked", "outage_ended", "run_ended"]


def test_a_store_that_hangs_delays_neither_the_loop_nor_the_end(store, recorder, monkeypatch):
    """P5: the loop never waits for the output root, and the end of a run waits for it a moment."""
    monkeypatch.setattr(event_recorder, "CLOSE_S", 0.2)
    store.hangs.set()
    recorder.started(SNAPSHOT)
    begun = time.monotonic()
    for second in range(100):
        recorder.poll(SNAPSHOT, begun + 10 * second)
    recorder.end("stopped")
    recorder.close()
    assert time.monotonic() - begun < 5
    assert read_events(store) == []


def test_a_root_that_refuses_events_costs_their_history_only(store, recorder, caplog):
    """P5: one warning, and no further attempts."""
    store.faults = [StorageRefusedError("403")]
    recorder.started(SNAPSHOT)
    poll_until(recorder, lambda: caplog.records)
    recorder.worker_asked(GROUP, 1)
    recorder.poll(SNAPSHOT, time.monotonic() + 1e6)
    recorder.end("failed", "403")
    recorder.close()
    assert "run_ended" not in kinds(store)
    assert len(caplog.records) == 1
    assert layout.EVENTS in next(store.list(layout.EVENTS))
