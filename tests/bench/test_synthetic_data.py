"""hv_batch.bench.throughput and .synthetic_data: CPU time over all processes, synthetic manifests and output roots."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from hv_batch.bench import synthetic_data, throughput
from hv_batch.bench.job_throughput import Load, job_config
from hv_batch.bench.throughput import Meter, ProgressMeter, cpu_seconds
from hv_batch.job.inspection.verify_seal import check_sealed
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.progress import Snapshot
from hv_batch.job.records.commits import read_commit
from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.records.run_document import open_run, read_run
from hv_batch.job.storage.store import Store
from tests.support.pending import iterate

CONFIG = job_config(Load(samples=3, groups=1, decoders=1, steps=2, step_seconds=0.0, frames=1))


def test_cpu_time_covers_this_process_and_its_descendants():
    """CPU time per sample includes every actor and Ray's own processes, and no other process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        seconds = cpu_seconds()
        assert {os.getpid(), child.pid} <= seconds.keys()
        assert os.getppid() not in seconds
        assert seconds[os.getpid()] > 0
        child.communicate(b"\n")
    assert child.pid not in cpu_seconds()


def test_processes_that_end_do_not_reduce_the_cpu_time(monkeypatch):
    """The times of released workers disappear; a new process counts from its start."""
    readings = iter([{1: 10.0, 2: 50.0}, {1: 11.0, 3: 0.5}])
    monkeypatch.setattr(throughput, "cpu_seconds", lambda: next(readings))
    meter = Meter()
    meter.read(100)
    assert meter.cpu_ms() is None
    meter.read(400)
    assert meter.cpu_ms() == pytest.approx(1000 * 1.5 / 300)


def test_a_run_is_metered_between_its_first_and_its_last_tenth(monkeypatch):
    """Samples of an earlier run and the start of the workers do not count."""
    readings = iter([{1: 1.0}, {1: 5.0}])
    monkeypatch.setattr(throughput, "cpu_seconds", lambda: next(readings))
    metered = ProgressMeter()

    def show(snapshot):
        record = logging.makeLogRecord({"progress": snapshot})
        metered.emit(record)

    for committed, starting in [(1000, 1), (1020, 1), (1030, 0), (1050, 0), (1090, 0), (1100, 0)]:
        show(
            Snapshot(
                total=1100,
                committed=committed,
                quarantined=0,
                done_before=1000,
                starting=starting,
                encoding=0,
                denoising=0,
                decoding=0,
            )
        )
    assert metered.meter.cpu_ms() == pytest.approx(1000 * 4.0 / 60)


@pytest.mark.parametrize("form", synthetic_data.FORMATS)
def test_a_manifest_is_the_same_in_every_format(tmp_path, form):
    """The rows do not depend on the format, so formats can be compared."""
    path = tmp_path / f"manifest.{form}"
    synthetic_data.write_manifest(path, 5)
    rows = [row for _, row in Manifest(str(path)).rows()]
    assert len({row["id"] for row in rows}) == 5
    assert rows[1] == {
        "id": "sample-00000001",
        "prompt": "sample 1: a slow pan over landscape, realistic style",
        "category": "landscape",
        "seed": 1,
    }


def test_a_synthetic_output_root_can_be_resumed(tmp_path):
    """P2: exactly the remaining samples are pending, and sealed shards match their records."""
    rows, committed = 600, 520
    manifest, output = tmp_path / "manifest.jsonl", tmp_path / "out"
    synthetic_data.write_manifest(manifest, rows)
    store = Store(str(output))
    index = check_manifest(Manifest(str(manifest)), CONFIG, Store(str(tmp_path / "spool")))
    index.publish(store)
    document = {
        "identity": {"parallel": {"device": CONFIG.parallel.device}, "manifest": index.summary.digest},
        "config": CONFIG.model_dump(mode="json"),
        "manifest": {"url": str(manifest), "rows": rows, "samples": rows},
        "versions": {},
    }
    open_run(store, document)
    synthetic_data.commit_first(output, manifest, CONFIG, committed)
    plan = PendingSamples(store, index)
    pending = [found.sample.row for found in iterate(plan)]
    assert pending == list(range(committed + 1, rows + 1))
    assert plan.counts.committed_before == committed
    assert plan.take_complete() == []
    records = [read_commit(store, 0, sample.key) for sample in index.samples(0)]
    assert len(records) == CONFIG.output.shard_size
    assert check_sealed(store, 0, records, read_run(store)) == []
