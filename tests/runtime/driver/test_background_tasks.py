"""When shards are sealed, and by how many tasks; the tasks are replaced by a list of the shards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from hv_batch.job.records.pending import CompleteShard
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.runtime.driver import background_tasks
from hv_batch.runtime.driver.background_tasks import SHARDS_PER_SEALER, BackgroundTasks
from hv_batch.runtime.driver.io_worker import IoWorker
from hv_batch.runtime.driver.loop_calls import LoopCalls
from hv_batch.runtime.driver.outage import Outage


class Sealers:
    """`begun` are the shards in the order in which their seals began; the test ends each by `end`."""

    def __init__(self, monkeypatch, shards):
        self.begun, self.waiting = [], {}
        pending = SimpleNamespace(take_complete=self._take)
        context = SimpleNamespace(store=None, config=SimpleNamespace(output=SimpleNamespace(webdataset=False)))
        self._complete = [CompleteShard(shard, ("key",)) for shard in range(shards)]
        self._now, self._error = 0.0, None
        self.lost = ()  # the result of each seal
        monkeypatch.setattr(background_tasks, "seal", SimpleNamespace(remote=self._seal))
        monkeypatch.setattr(background_tasks, "ray", SimpleNamespace(get=self._get))
        monkeypatch.setattr(background_tasks, "time", SimpleNamespace(monotonic=lambda: self._now))
        outage = Outage()
        records_io = IoWorker("records", LoopCalls(), outage)
        self.background_tasks = BackgroundTasks(context, pending, {}, outage, records_io, self.waiting.__setitem__)

    def _take(self):
        complete, self._complete = self._complete, []
        return complete

    def _seal(self, _store, shard, *_):
        self.begun.append(shard)
        return shard

    def _get(self, _ref):
        if self._error:
            raise self._error
        return self.lost

    def end(self, shard, error=None):
        self._error = error and RayTaskError("seal", "", error)
        self.waiting.pop(shard)(shard)
        self.background_tasks.start_seals()

    def pass_time(self, seconds):
        self._now += seconds
        self.background_tasks.start_seals()


@pytest.mark.parametrize(("shards", "at_once"), [(1, 1), (SHARDS_PER_SEALER, 1), (SHARDS_PER_SEALER + 1, 2), (14, 3)])
def test_the_number_of_sealers_follows_the_shards_that_wait(monkeypatch, shards, at_once):
    """Speed: one process seals; another is started only if four shards wait for each that does."""
    sealers = Sealers(monkeypatch, shards)
    sealers.background_tasks.start_seals()
    assert len(sealers.waiting) == at_once
    while sealers.waiting:
        assert sealers.background_tasks.has_pending
        sealers.end(next(iter(sealers.waiting)))
    assert sealers.begun == list(range(shards))
    assert not sealers.background_tasks.has_pending


def test_a_shard_that_met_an_outage_is_sealed_after_it(monkeypatch):
    """P5: it waits with all shards behind it, and is the first that is tried again."""
    sealers = Sealers(monkeypatch, 3)
    sealers.background_tasks.start_seals()
    sealers.end(0, StorageUnavailableError("away"))
    assert sealers.begun == [0]
    assert sealers.background_tasks.has_pending
    sealers.pass_time(3600 * 24)
    for shard in (0, 1, 2):
        sealers.end(shard)
    assert sealers.begun == [0, 0, 1, 2]
    assert not sealers.background_tasks.has_pending


def test_samples_whose_files_are_lost_are_counted_and_named(monkeypatch, logged):
    """P1: the run renders them again; the log says how many there are and names some."""
    sealers = Sealers(monkeypatch, 1)
    sealers.lost = tuple(f"s{number:03d}" for number in range(7))
    sealers.background_tasks.start_seals()
    sealers.end(0)
    assert sealers.background_tasks.lost == 7
    assert "7 committed samples" in logged[0]
    assert "s004, ..." in logged[0]
