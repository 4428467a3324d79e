"""The driver's own part in an outage of the output root: P5, P2."""

from __future__ import annotations

import time

import pytest

from hv_batch.job import layout
from hv_batch.job.records import commits
from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.scheduling.limits import OUTAGE_LIMIT_S, OUTAGE_PAUSE_S
from hv_batch.job.stages import Stage
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.driver.outage import Outage
from tests.support.pending import iterate
from tests.support.rendered_roots import make_commit, make_sample
from tests.support.small_runs import ListedShards

AWAY = StorageUnavailableError("s3://bucket/run: 503")


def test_an_outage_is_logged_once_and_so_is_its_end(logged):
    """P5: a line when it begins, with what to expect, and one when it is over; none for a root that answers."""
    outage = Outage()
    outage.note_success(0.0)
    assert (logged, outage.pauses(0.0)) == ([], False)
    outage.note_failure(AWAY, 1.0)
    outage.note_failure(AWAY, 1.0 + OUTAGE_PAUSE_S)
    assert len(logged) == 1
    assert "503" in logged[0]
    outage.note_success(100.0)
    assert logged[1:] == ["the output root answers again, after 01:39"]
    assert not outage.pauses(100.0)


def test_tries_are_far_between():
    """P5: a root that does not answer is not flooded with requests."""
    outage = Outage()
    outage.note_failure(AWAY, 10.0)
    assert outage.pauses(10.0 + OUTAGE_PAUSE_S - 0.1)
    assert not outage.pauses(10.0 + OUTAGE_PAUSE_S)


def test_an_outage_without_end_ends_the_run():
    """P5: with the error and the remedy; a new outage has its own time."""
    outage = Outage()
    outage.note_failure(AWAY, 0.0)
    outage.note_failure(AWAY, OUTAGE_LIMIT_S)
    outage.note_success(OUTAGE_LIMIT_S)
    outage.note_failure(AWAY, OUTAGE_LIMIT_S + 1)
    outage.note_failure(AWAY, 2 * OUTAGE_LIMIT_S)
    with pytest.raises(UserError, match=r"not answered for 30:0\d: s3://bucket/run: 503.*same command"):
        outage.note_failure(AWAY, 2 * OUTAGE_LIMIT_S + 2)


@pytest.mark.parametrize("act", ["list", "delete"])
def test_a_scan_goes_on_after_an_outage(tmp_path, monkeypatch, act):
    """P2: no shard is skipped and none is taken for finished, however often the root does not answer in between."""
    store = Store(str(tmp_path))
    samples = [make_sample(number) for number in range(1, 10)]
    for sample in samples[:4]:
        commits.commit(store, make_commit(sample))
    store.put(layout.latent_key(0, "s001"), b"left behind")
    real, faults, met = getattr(Store, act), [AWAY, AWAY], []

    def flaky(self, *arguments):
        if faults:
            raise faults.pop()
        return real(self, *arguments)

    def retry(call):
        while True:
            try:
                return call()
            except StorageUnavailableError as error:
                met.append(error)

    monkeypatch.setattr(Store, act, flaky)
    plan = PendingSamples(store, ListedShards(samples))
    pending = list(iterate(plan, retry))
    assert met == [AWAY, AWAY]
    assert [(each.sample, each.stage) for each in pending] == [(sample, Stage.ENCODE) for sample in samples[4:]]
    assert plan.counts.committed_before == 4
    assert [complete.shard for complete in plan.take_complete()] == [0]
    assert not store.exists(layout.latent_key(0, "s001"))


def test_an_outage_does_not_stop_the_run_at_the_end_of_a_shard(tmp_path, monkeypatch):
    """P5: the next shards have been looked up before, so that groups have samples while the root does not answer."""
    store = Store(str(tmp_path))
    samples = [make_sample(number) for number in range(1, 13)]
    real, prefixes = Store.list, []

    def watched(self, prefix):
        prefixes.append(prefix)
        return real(self, prefix)

    monkeypatch.setattr(Store, "list", watched)
    pending = iterate(PendingSamples(store, ListedShards(samples)))
    first = next(pending)
    deadline = time.monotonic() + 60
    while sum(prefix.startswith("retried/") for prefix in prefixes) < 3:
        assert time.monotonic() < deadline, prefixes
        time.sleep(0.01)

    def away(self, *_):
        raise AWAY

    for name in ("list", "exists", "get", "delete"):
        monkeypatch.setattr(Store, name, away)
    assert [each.sample for each in (first, *pending)] == samples
