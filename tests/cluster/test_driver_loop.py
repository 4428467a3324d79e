"""The driver's loop on a real Ray: it does no I/O itself, and goes on while the output root or a look-up stalls."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import ray
import yaml

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.storage.store import Store
from hv_batch.runtime.driver.loop import Driver
from hv_batch.runtime.render import render
from hv_batch.runtime.run_end import ExitCode
from tests.support.runs import DEADLINE_S, count, records, write_config, write_manifest

STORE_METHODS = ("exists", "list", "get", "get_file", "modified", "delete", "put_new_all", "put_all", "put_file")
RAY_REQUESTS = ("nodes", "available_resources", "cluster_resources")  # to its control store, which may answer late


class Guard:
    """Notes which threads call a store, connect a socket or ask for the cluster's state while the driver's loop runs.

    `stalls` maps the name of a thread to a condition: the thread's first call returns only once that holds.
    """

    def __init__(self, monkeypatch, stalls):
        self.threads, self.in_loop, self.timeouts = set(), [], []
        self.longest_s = None
        self._loop = None
        self._stalls = dict(stalls)
        for name in STORE_METHODS:
            monkeypatch.setattr(Store, name, self._watched(f"Store.{name}", getattr(Store, name)))
        monkeypatch.setattr(socket, "create_connection", self._watched("connect", socket.create_connection))
        for name in RAY_REQUESTS:
            monkeypatch.setattr(ray, name, self._watched(f"ray.{name}", getattr(ray, name)))
        monkeypatch.setattr(Driver, "run", self._entered(Driver.run))

    def _entered(self, run):
        def wrapped(driver):
            self._loop = threading.get_ident()
            outcome = run(driver)
            self._loop, self.longest_s = None, outcome.loop_max_s
            return outcome

        return wrapped

    def _watched(self, name, act):
        def wrapped(*arguments, **options):
            if self._loop is not None:
                self._note(name, arguments)
            return act(*arguments, **options)

        return wrapped

    def _note(self, name, arguments):
        if threading.get_ident() == self._loop:
            self.in_loop.append((name, *map(str, arguments[1:])))
            return
        thread = threading.current_thread().name.partition("_")[0]
        self.threads.add(thread)
        if condition := self._stalls.pop(thread, None):
            deadline = time.monotonic() + DEADLINE_S
            while not condition():
                if time.monotonic() > deadline:
                    self.timeouts.append(thread)
                    return
                time.sleep(0.05)


@pytest.fixture
def run(ray_head, tmp_path, marks):
    """Renders the prompts in this process, so that its calls can be watched."""

    def run(prompts) -> ExitCode:
        config = RunConfig.model_validate(yaml.safe_load(write_config(tmp_path, marks).read_text()))
        return render(config, str(write_manifest(tmp_path, prompts)), str(tmp_path / "out"), address=ray_head[0])

    return run


@pytest.mark.parametrize(
    "killed", [(), pytest.param(("killed !kill-denoise-once",), marks=pytest.mark.slow)], ids=["", "rebuilt"]
)
def test_the_loop_does_no_io_and_does_not_wait_for_any(run, tmp_path, marks, monkeypatch, killed):
    """P5: a sample is quarantined, a group may be rebuilt in its reservation, and no call to a store, a node or Ray's
    control store is made in the loop's thread. The quarantine record stalls until every other sample is decoded, which
    the loop must arrange.
    """
    good = ["good 0", *killed, *(f"good {i}" for i in range(1, 7))]
    prompts = ["bad !raise-denoise", *good]
    guard = Guard(monkeypatch, {"driver-records": lambda: count(marks, "decoded").total() == len(good)})
    assert run(prompts) is ExitCode.QUARANTINED
    assert guard.in_loop == []
    others = {"driver-records", "driver-lookups", "driver-probes", "driver-cluster", "driver-events", "plan"}
    assert guard.threads >= others, "the test has lost its point"
    assert guard.timeouts == []
    assert len(records(tmp_path / "out")) == len(good)
    assert list(records(tmp_path / "out", "quarantine")) == ["s00"]


@pytest.mark.slow
def test_groups_render_while_a_look_up_stalls(run, tmp_path, marks, monkeypatch):
    """P5: the look-up of a later shard does not return before the samples of the first are committed."""
    output = tmp_path / "out"
    guard = Guard(monkeypatch, {})
    exists = Store.exists

    def stalled(self, key):
        if key.startswith("data/shard-00001"):
            deadline = time.monotonic() + DEADLINE_S
            while len(records(output)) < 4:
                if time.monotonic() > deadline:
                    guard.timeouts.append(key)
                    break
                time.sleep(0.05)
        return exists(self, key)

    monkeypatch.setattr(Store, "exists", stalled)
    assert run([f"prompt {i}" for i in range(6)]) is ExitCode.COMMITTED
    assert guard.timeouts == []
    assert guard.in_loop == []
    assert len(records(output)) == 6
    assert 0 < guard.longest_s < DEADLINE_S
