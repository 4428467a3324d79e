"""The events of a root are read within bounds, whatever anyone has written there, and nothing depends on them."""

from __future__ import annotations

import json

import pytest

from hv_batch.job import layout
from hv_batch.job.event_log import reader
from hv_batch.job.event_log.reader import DriverEvents, check_part, list_parts, read_events
from hv_batch.job.storage.store import Store

FIRST, SECOND = "20261128T220000Z-0a1b2c3d", "20261129T014500Z-00000001"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


def put(store: Store, driver: str, part: int, *lines: object) -> str:
    key = layout.event_part(driver, part)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    store.put(key, text.encode())
    return key


def ready(at: float, worker: str = "denoise-0.0") -> dict:
    return {"at": at, "kind": "worker_ready", "worker": worker, "stage": "denoise", "nodes": ["10.0.0.1"], "gpus": 1.0}


def test_drivers_and_their_parts_in_order(store):
    put(store, SECOND, 0, ready(30.0))
    put(store, FIRST, 10, ready(20.0))
    put(store, FIRST, 9, ready(10.0), ready(11.0))
    drivers = read_events(store)
    assert [(each.driver, [event["at"] for event in each.events]) for each in drivers] == [
        (FIRST, [10.0, 11.0, 20.0]),
        (SECOND, [30.0]),
    ]
    assert drivers[1].started_at == 1795916700.0
    assert read_events(store, newest=1) == drivers[1:]
    assert drivers[0].last("worker_ready", "worker_lost") == ready(20.0)
    assert read_events(Store(f"{store.url}/empty")) == []


def test_a_root_with_hostile_events(store):
    """P5: invalid lines are left out, other objects are ignored, and `verify` gives the reason of each."""
    lines = ["not json", "[1]", json.dumps(ready(1.0) | {"gpus": "1"}), json.dumps(ready(2.0) | {"later": [1]})]
    lines += [json.dumps(ready(3.0) | {"message": "x" * 9000}), json.dumps(ready(float("inf"))), "{" * 500, "\0"]
    key = put(store, FIRST, 0, *lines, ready(4.0))
    assert read_events(store) == [DriverEvents(FIRST, (ready(2.0), ready(4.0)))]
    for name in ("events/x.jsonl", f"events/{FIRST}/0.jsonl", f"events/{FIRST}/00001.json", f"events/{FIRST}/a/00000"):
        store.put(name, b"{}")
    assert list_parts(store) == [key]
    assert "line 1: not a JSON object" in str(check_part(store, key))
    assert check_part(store, put(store, FIRST, 1, ready(5.0))) is None


def test_bounds_of_a_reading(store, monkeypatch):
    """P7: the newest parts of the newest drivers, and no part that no driver has written so large."""
    monkeypatch.setattr(reader, "MAX_PART_BYTES", 1000)
    monkeypatch.setattr(reader, "MAX_BYTES", 400)
    line = len(json.dumps(ready(1.0))) + 1
    assert 2 * line <= 400 < 4 * line
    for part in range(4):
        put(store, SECOND, part, ready(float(part)))
    put(store, SECOND, 4, *[ready(9.0)] * 20)
    (driver,) = read_events(store)
    assert [event["at"] for event in driver.events] == [float(part) for part in range(4)][-(400 // line) :]


def test_parts_are_read_once(store, monkeypatch):
    put(store, FIRST, 0, ready(1.0))
    parts: dict = {}
    assert len(read_events(store, parts=parts)) == 1
    put(store, FIRST, 1, ready(2.0))
    read = []
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda self, key: (read.append(key), get(self, key))[1])
    (driver,) = read_events(store, parts=parts)
    assert [event["at"] for event in driver.events] == [1.0, 2.0]
    assert read == [layout.event_part(FIRST, 1)]
