"""`status` says what the last driver of a root does or did, and since when, from its events alone."""

from __future__ import annotations

import json

import pytest

from hv_batch.job import layout
from hv_batch.job.inspection.activity import describe_driver, read_activity
from hv_batch.job.records.lease_holder import this_process
from hv_batch.job.storage.store import Store

DRIVER = "20261129T014500Z-0a1b2c3d"


def event(at: float, kind: str, **fields: object) -> dict:
    return {"at": at, "kind": kind, **fields}


def worker(at: float, kind: str, name: str, **fields: object) -> dict:
    return event(at, f"worker_{kind}", worker=name, stage=name.partition("-")[0], nodes=["10.0.0.1"], **fields)


def progress(at: float, committed: int, pending: int) -> dict:
    return event(at, "progress", committed=committed, quarantined=0, pending=pending)


STARTED = event(0.0, "run_started", samples=100, committed=0, pending=100, host="head")
GROUP = [
    worker(1.0, "asked", "denoise-0.0"),
    worker(5.0, "placed", "denoise-0.0"),
    worker(60.0, "ready", "denoise-0.0"),
]
LOST = worker(90.0, "lost", "denoise-0.0", **{"class": "INFRA", "message": "its node is gone"})
RELEASED = worker(90.0, "released", "denoise-0.0", message="not needed")


@pytest.mark.parametrize(
    ("events", "is_alive", "phase", "since"),
    [
        ([], True, "starting", 0.0),
        (GROUP[:2], True, "starting", 0.0),
        (GROUP, True, "rendering", 60.0),
        ([*GROUP, LOST], True, "starting", 90.0),
        ([*GROUP, RELEASED], True, "rendering", 60.0),
        ([*GROUP, event(70.0, "outage_started")], True, "outage", 70.0),
        ([*GROUP, event(70.0, "outage_started"), event(80.0, "outage_ended", seconds=10.0)], True, "rendering", 80.0),
        ([*GROUP, event(70.0, "drain_started"), progress(75.0, 1, 99)], True, "draining", 70.0),
        ([*GROUP, event(70.0, "run_ended", outcome="stopped")], False, "stopped", 70.0),
        ([*GROUP, progress(75.0, 1, 99)], False, "lost", 75.0),
    ],
)
def test_what_a_driver_does_and_since_when(events, is_alive, phase, since):
    found = describe_driver(DRIVER, [STARTED, *events], is_alive=is_alive)
    assert (found.phase, found.since) == (phase, since)
    assert json.loads(json.dumps(found.to_dict()))["phase"] == phase


def test_workers_and_losses_are_counted():
    pool = [worker(1.0, "asked", "decode-0.0"), worker(2.0, "asked", "decode-1.0"), worker(3.0, "placed", "decode-1.0")]
    again = [worker(91.0, "asked", "denoise-0.1")]
    found = describe_driver(DRIVER, [STARTED, *GROUP, *pool, LOST, *again], is_alive=True)
    assert found.workers == {
        "denoise": {"ready": 0, "loading": 0, "waiting": 1},
        "decode": {"ready": 0, "loading": 1, "waiting": 1},
    }
    assert found.lost == {"INFRA": 1}
    lines = found.render()
    assert "workers: groups (1 waiting), decoders (1 loading, 1 waiting)" in lines
    assert lines[-1].endswith("denoise-0.0 lost on 10.0.0.1: INFRA: its node is gone")


def test_the_rate_is_that_of_the_last_hour_without_the_start():
    """The log's last hour counts, and the time in which workers load does not."""
    slow = [progress(600.0, 0, 100), progress(1200.0, 0, 100), progress(4800.0, 10, 90)]
    assert describe_driver(DRIVER, [STARTED, *slow], is_alive=True).samples_per_hour == pytest.approx(10.0)
    fast = [*slow, progress(8400.0, 40, 60)]
    found = describe_driver(DRIVER, [STARTED, *fast], is_alive=True)
    assert (found.samples_per_hour, found.eta_s) == (pytest.approx(30.0), pytest.approx(7200.0))
    assert describe_driver(DRIVER, [STARTED, *fast], is_alive=False).eta_s is None
    assert describe_driver(DRIVER, [STARTED, *slow[:2]], is_alive=True).samples_per_hour is None


def test_a_root_without_events_or_with_hostile_ones(tmp_path):
    """P5: any event, in any order, gives lines without control characters."""
    store = Store(str(tmp_path))
    assert read_activity(store, None) is None
    lines = [
        event(1e11, "run_ended", message="\x1b[2J\nx" * 50, outcome="failed"),
        event(3.0, "worker_ready", stage="encode", worker="\x1b[2J"),
        event(2.0, "progress", committed=2**53, pending=2**53),
        event(1.0, "progress"),
        event(0.0, "later_kind", later=["anything"]),
    ]
    store.put(layout.event_part(DRIVER, 0), b"\n".join(json.dumps(line).encode() for line in lines))
    found = read_activity(store, this_process("run"))
    assert found.phase == "failed"
    assert all(line.isprintable() for line in found.render())
    json.dumps(found.to_dict())
