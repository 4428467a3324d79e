"""Measure the job without a model: committed samples per second with full durability, and the driver's memory.

The engine sleeps (`hv_batch.bench.sleep_engine`). All else is the production path: Ray, the scheduler, latents that are
stored before the decode, media, conditional commits, sealed shards and the report.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Any

from hv_batch.bench.ray_data_baseline import check_ray_data, measure_map_batches
from hv_batch.bench.synthetic_data import FORMATS, commit_first, write_manifest
from hv_batch.bench.throughput import ProgressMeter, Throughput, attached_handler, per_second
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import (
    DecodersConfig,
    Defaults,
    EncodersConfig,
    GroupsConfig,
    ModelConfig,
    ParallelConfig,
)
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.manifest.selection import Selection
from hv_batch.protocol import UserError
from hv_batch.runtime.render import render
from hv_batch.runtime.run_end import ExitCode
from hv_batch.runtime.session import ray_session

SCRATCH = "hv_batch-bench-"
SIDE = 64  # pixels; small, because the overhead of the job does not depend on the size


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the benchmark renders, and the manifest and the output root that it starts from."""

    samples: int
    groups: int
    decoders: int
    steps: int
    step_seconds: float
    frames: int
    committed: int = 0  # samples that a synthetic earlier run has committed; they precede the rendered ones
    rows: int = 0  # rows of the manifest, if more than the committed and the rendered samples
    format: str = "jsonl"  # format of the manifest, one of `synthetic_data.FORMATS`

    @property
    def all_rows(self) -> int:
        return max(self.rows, self.committed + self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    load: Load
    pace: Throughput  # throughput of commits
    first_denoise_s: float  # from the command to the first denoise: manifest check, start of Ray and of the workers
    makespan_s: float  # from the first denoise to the last commit
    groups_busy: float  # fraction of the time between the first and the last commit that groups spend in denoising
    driver_mb: float  # peak resident memory of the driver process, in MB
    loop_max_ms: float  # longest iteration of the driver's loop while a worker had a task, in ms
    ray_data: Throughput | None = None  # throughput of `ray_data_baseline`; None if it was not measured

    def render(self) -> str:
        load = self.load
        lines = [
            f"{load.samples:,} samples of {load.frames} frame(s), {load.groups} groups, {load.decoders} decoders: "
            f"{self.pace.render()}, groups busy {self.groups_busy:.1%} of the time",
            f"{load.all_rows:,} rows ({load.format}), {load.committed:,} committed earlier: first denoise after "
            f"{self.first_denoise_s:.1f} s, driver {self.driver_mb:,.0f} MB, longest iteration of its loop "
            f"{self.loop_max_ms:.0f} ms",
        ]
        if self.ray_data is not None:
            ratio = self.pace.per_second / self.ray_data.per_second
            lines.append(
                f"Ray Data's map_batches, without durability: {self.ray_data.render()}; hv_batch has {ratio:.2f} of "
                "its throughput"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_job(load: Load, *, with_ray_data: bool = False) -> JobReport:
    """Render `load` into a temporary folder on a local Ray, then with Ray Data on a second one if `with_ray_data`.

    Raises UserError if the format is unknown, if Ray Data cannot run, and in the cases in which a run raises it.
    """
    if load.format not in FORMATS:
        raise UserError(f"--format {load.format!r} is unknown. Allowed values: {', '.join(FORMATS)}.")
    if with_ray_data:
        check_ray_data()
    config, meter = job_config(load), ProgressMeter()
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as name:
        manifest, output = Path(name) / f"manifest.{load.format}", Path(name) / "out"
        _in_subprocess(write_manifest, manifest, load.all_rows)
        if load.committed:
            _run(config, manifest, output, selection=Selection(limit=1))
            _in_subprocess(commit_first, output, manifest, config, load.committed)
        last = load.committed + load.samples
        begun = time.time()
        with attached_handler(meter):
            _run(config, manifest, output, selection=Selection(limit=last) if last < load.all_rows else None)
        driver_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        records = _records_since(begun, output, config, load.committed)
        ray_data = _time_ray_data(load, output.parent) if with_ray_data else None
    ends = sorted(record.end for record in records)
    span = ends[-1] - ends[0]
    return JobReport(
        load=load,
        pace=Throughput(per_second(ends), meter.meter.cpu_ms()),
        first_denoise_s=min(record.begin for record in records) - begun,
        makespan_s=ends[-1] - min(record.begin for record in records),
        groups_busy=(len(ends) - 1) * load.steps * load.step_seconds / (load.groups * span),
        driver_mb=driver_mb,
        loop_max_ms=1000 * meter.loop_max_s,
        ray_data=ray_data,
    )


def _time_ray_data(load: Load, folder: Path) -> Throughput:
    config, output = job_config(load), folder / "ray_data"
    output.mkdir()
    with ray_session(resolve_run(config), "local"):
        return measure_map_batches(config, load.samples, load.decoders, output)


@contextmanager
def rendered(config: RunConfig, samples: int, stopped: Event | None = None) -> Iterator[Path]:
    """Render `samples` samples on a local Ray and yield the output root, which is removed after the block.

    The run ends early if `stopped` is set. Raises UserError in the cases in which a run raises it.
    """
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as name:
        manifest, output = Path(name) / "manifest.jsonl", Path(name) / "out"
        write_manifest(manifest, samples)
        _run(config, manifest, output, stopped=stopped)
        yield output


def _run(
    config: RunConfig,
    manifest: Path,
    output: Path,
    *,
    selection: Selection | None = None,
    stopped: Event | None = None,
) -> None:
    with redirect_stdout(sys.stderr):  # Ray prints messages about killed processes; stdout is for the report
        code = render(
            config,
            str(manifest),
            str(output),
            selection=selection,
            address="local",
            stopped=stopped,
        )
    expected = ExitCode.STOPPED if stopped and stopped.is_set() else ExitCode.COMMITTED
    assert code is expected, f"the run of the benchmark ended with {code}, expected {expected}"


def _in_subprocess(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function` in another process, so that its memory does not count as the driver's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(function, *arguments).result()


@dataclass(frozen=True, slots=True)
class _Times:
    """Times of one sample, in seconds since the epoch."""

    begin: float  # start of the denoise
    end: float  # commit


def _records_since(begun: float, output: Path, config: RunConfig, committed: int) -> list[_Times]:
    """Return the times of the samples that were committed at or after `begun`.

    Shards that the first `committed` samples fill are not read.
    """
    times = []
    for path in (output / "commits").iterdir():
        if int(path.name.rpartition("-")[2]) < committed // config.output.shard_size:
            continue
        for record in map(json.loads, (file.read_text() for file in path.glob("[!.]*.json"))):
            end = datetime.fromisoformat(record["created_at"]).timestamp()
            if end >= begun:
                took = record["stages"]["denoise"] + record["stages"]["decode"]
                times.append(_Times(end - took, end))
    return times


def job_config(load: Load) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            engine="hv_batch.bench.sleep_engine:SleepEngine", options={"step_seconds": load.step_seconds}
        ),
        defaults=Defaults(height=SIDE, width=SIDE, num_frames=load.frames, num_inference_steps=load.steps),
        parallel=ParallelConfig(device="cpu", ulysses_degree=1),
        groups=GroupsConfig(count=load.groups, gpus_per_rank=0.0, cpus_per_rank=0.1),
        encoders=EncodersConfig(gpus=0.0, cpus=0.1),
        decoders=DecodersConfig(count=load.decoders, gpus=0.0, cpus=0.1),
    )
