"""Shards are looked up in a thread, ahead of the loop and not too far."""

from __future__ import annotations

import time

import pytest

from hv_batch.job.records import commits
from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.storage.store import Store
from hv_batch.runtime.driver.io_worker import IoWorker
from hv_batch.runtime.driver.loop_calls import LoopCalls
from hv_batch.runtime.driver.outage import Outage
from hv_batch.runtime.driver.shard_lookups import MAX_UNFINISHED_SCANS, ShardLookups
from tests.support.rendered_roots import make_commit, make_sample
from tests.support.small_runs import ListedShards

DEADLINE_S = 60


@pytest.fixture
def start(tmp_path):
    started = []

    def start(samples):
        calls = LoopCalls()
        pending = PendingSamples(Store(str(tmp_path)), ListedShards(samples))
        lookups = ShardLookups(pending, IoWorker("lookups", calls, Outage()))
        started.append(lookups)
        return pending, lookups, calls

    yield start
    for lookups in started:
        lookups.close()


def take(lookups, calls):
    """The next sample, or None at the end."""
    deadline = time.monotonic() + DEADLINE_S
    while (pending := lookups.next()) is None and not lookups.is_exhausted:
        assert time.monotonic() < deadline
        calls.make_due(time.monotonic())
        time.sleep(0.001)
    return pending


def test_all_pending_samples_come_in_order(start, tmp_path):
    """P1, P2: each once, counts included; the end is known when the last is taken."""
    samples = [make_sample(number) for number in range(1, 16)]
    for sample in samples[2:9]:
        commits.commit(Store(str(tmp_path)), make_commit(sample))
    pending, lookups, calls = start(samples)
    taken = []
    while found := take(lookups, calls):
        taken.append(found.sample)
    assert taken == [*samples[:2], *samples[9:]]
    assert pending.counts.committed_before == 7
    assert lookups.is_exhausted


def test_the_samples_of_few_shards_are_held(start):
    """P7: the thread waits once it is that far ahead, and ends when it is closed."""
    samples = [make_sample(number) for number in range(1, 61)]
    shards = {sample.shard for sample in samples}
    pending, lookups, calls = start(samples)
    scanned, scans = [], pending.scanner.scans

    def counted(retry):
        for scan in scans(retry):
            scanned.append(scan.shard)
            yield scan

    pending.scanner.scans = counted
    first = take(lookups, calls)
    assert first.sample == samples[0]
    deadline = time.monotonic() + DEADLINE_S
    while len(scanned) < MAX_UNFINISHED_SCANS + 2:  # those that wait, that of the loop, and one in the thread's hand
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(scanned) == MAX_UNFINISHED_SCANS + 2 < len(shards)
    lookups.close()
    lookups._worker._thread.join(DEADLINE_S)
    assert not lookups._worker._thread.is_alive()
