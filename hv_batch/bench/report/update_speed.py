"""Measure the report of a root of many synthetic samples: time, peak memory and the size of the page."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hv_batch.bench.synthetic_data import commit_first, write_manifest
from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.formatting import size
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.records.run_document import open_run
from hv_batch.job.storage.store import Store

PENDING = 500  # samples of the root that have no record


@dataclass(frozen=True, slots=True)
class ReportSpeed:
    """`first` is the report of a root without one, `again` the next one, after one more record in `changed`.

    The times are those of the command `hv-batch report`, of which its start takes `start`: (seconds, seconds of CPU).
    """

    samples: int
    start: tuple[float, float]
    first: tuple[float, float]
    again: tuple[float, float]
    changed: tuple[float, float]
    peak_bytes: int  # of the first report
    again_peak_bytes: int
    page_bytes: int
    part_bytes: int  # of all parts

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> str:
        return (
            f"{self.samples:,} samples: first report {_seconds(self.first)}, again {_seconds(self.again)}, after one "
            f"more record {_seconds(self.changed)}; of each, the start of the command takes {_seconds(self.start)}\n"
            f"peak memory {size(self.peak_bytes)} and {size(self.again_peak_bytes)}; index.html "
            f"{size(self.page_bytes)}, parts {size(self.part_bytes)}"
        )


def _seconds(taken: tuple[float, float]) -> str:
    return f"{taken[0]:.1f} s ({taken[1]:.1f} s of CPU)"


def bench_report(samples: int) -> ReportSpeed:
    """Measure the report of a root in a temporary folder with `samples` committed samples."""
    with tempfile.TemporaryDirectory(prefix="hv_batch-bench-") as scratch:
        root = Path(scratch, "root")
        make_root(root, samples)
        start, _ = _command("report", "--help")
        first, peak = _command("report", str(root), "--json")
        again, again_peak = _command("report", str(root), "--json")
        last = max((root / layout.COMMITS).rglob("*.json"))
        last.write_bytes(last.read_bytes() + b" ")  # another size: the shard has changed
        changed, _ = _command("report", str(root), "--json")
        parts = sum(path.stat().st_size for path in (root / "report/parts").iterdir())
        page = (root / layout.REPORT).stat().st_size
        return ReportSpeed(samples, start, first, again, changed, peak, again_peak, page, parts)


def make_root(root: Path, samples: int) -> None:
    """An output root with `samples` committed samples without media, and PENDING others."""
    manifest, rows = root.parent / "manifest.jsonl", samples + PENDING
    write_manifest(manifest, rows)
    config = RunConfig()
    store = Store(str(root))
    index = check_manifest(Manifest(str(manifest)), config, Store(str(root.parent / "checked")))
    index.publish(store)
    document = {
        "identity": {"parallel": {"device": config.parallel.device}, "manifest": index.summary.digest},
        "config": config.model_dump(mode="json"),
        "manifest": {"url": str(manifest), "rows": rows, "samples": rows},
        "versions": {},
    }
    open_run(store, document)
    commit_first(root, manifest, config, samples)


def _command(*arguments: str) -> tuple[tuple[float, float], int]:
    """The seconds, seconds of CPU and peak memory in bytes of a command in a process of its own."""
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "hv_batch", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"hv-batch {arguments[0]} has failed with exit code {child.returncode}")
    seconds = round(time.perf_counter() - begun, 2), round(usage.ru_utime + usage.ru_stime, 2)
    return seconds, usage.ru_maxrss * 1024
