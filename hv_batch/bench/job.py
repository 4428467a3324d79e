"""Time the job around the model: committed samples a second with all durability on, and the driver's memory.

The engine sleeps (`hv_batch.bench.idle_engine`); all else is real: Ray, the scheduler, latents that are stored before
they are decoded, media, conditional commits, sealed shards, the report.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Any

from hv_batch.bench.yardstick import check_ray_data, pace_of_map_batches
from hv_batch.job.config import (
    DecodersConfig,
    Defaults,
    EncodersConfig,
    GroupsConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from hv_batch.job.progress import Progress
from hv_batch.protocol import ParallelPlan
from hv_batch.runtime.render import ExitCode, render
from hv_batch.runtime.session import ray_session

SIDE = 64  # pixels: as small as the job's own cost, which does not depend on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the bench renders."""

    samples: int
    groups: int
    decoders: int
    steps: int
    step_seconds: float
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    load: Load
    per_second: float  # committed, between the first commit and the last
    groups_busy: float  # share of the groups' time, in the same span
    driver_mb: float  # peak resident memory of the driver's process
    ray_data_per_second: float | None = None  # what `yardstick` finds; None where it was not asked for

    def render(self) -> str:
        load, yardstick = self.load, ""
        if self.ray_data_per_second is not None:
            yardstick = (
                f"\nRay Data's map_batches, keeping no promise: {self.ray_data_per_second:.1f} a second; hv_batch has "
                f"{self.per_second / self.ray_data_per_second:.2f} of its pace"
            )
        return (
            f"{load.samples:,} samples of {load.frames} frame(s), {load.groups} groups, {load.decoders} decoders: "
            f"{self.per_second:.1f} committed a second, groups busy {self.groups_busy:.1%} of the time, "
            f"driver {self.driver_mb:,.0f} MB{yardstick}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_job(load: Load, progress: Progress, *, with_ray_data: bool = False) -> JobReport:
    """Render the load into a temporary folder on a local Ray; then, if asked, let Ray Data do the like on another.

    Raises UserError as a run does, and where Ray Data cannot run.
    """
    if with_ray_data:
        check_ray_data()
    with rendered(_config(load), load.samples, progress) as output:
        ends = sorted(_ends(output))
        driver_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        ray_data = _time_ray_data(load, output.parent) if with_ray_data else None
    span = ends[-1] - ends[0]
    busy = (load.samples - 1) * load.steps * load.step_seconds / (load.groups * span)
    return JobReport(
        load=load,
        per_second=(len(ends) - 1) / span,
        groups_busy=busy,
        driver_mb=driver_mb,
        ray_data_per_second=ray_data,
    )


def _time_ray_data(load: Load, folder: Path) -> float:
    config, output = _config(load), folder / "ray_data"
    output.mkdir()
    with ray_session(config, ParallelPlan(), "local"):
        return pace_of_map_batches(config, load.samples, load.decoders, output)


@contextmanager
def rendered(config: RunConfig, samples: int, progress: Progress, stopped: Event | None = None) -> Iterator[Path]:
    """The output root of a run on a local Ray, which is removed again. Raises UserError as a run does.

    `stopped` ends the run before its last sample.
    """
    with tempfile.TemporaryDirectory(prefix="hv_batch-bench-") as name:
        manifest, output = Path(name) / "manifest.jsonl", Path(name) / "out"
        with manifest.open("w") as file:
            file.writelines(json.dumps({"prompt": f"sample {n}"}) + "\n" for n in range(samples))
        with redirect_stdout(sys.stderr):  # where Ray tells of processes that were killed; the report goes to stdout
            code = render(config, str(manifest), str(output), address="local", progress=progress, stopped=stopped)
        ended_well = ExitCode.STOPPED if stopped and stopped.is_set() else ExitCode.COMMITTED
        assert code is ended_well, f"the bench's run ended with {code}"
        yield output


def _config(load: Load) -> RunConfig:
    return RunConfig(
        model=ModelConfig(engine="hv_batch.bench.idle_engine:IdleEngine", options={"step_seconds": load.step_seconds}),
        defaults=Defaults(height=SIDE, width=SIDE, num_frames=load.frames, num_inference_steps=load.steps),
        parallel=ParallelConfig(device="cpu", ulysses_degree=1),
        groups=GroupsConfig(count=load.groups, gpus_per_rank=0.0, cpus_per_rank=0.1),
        encoders=EncodersConfig(gpus=0.0, cpus=0.1),
        decoders=DecodersConfig(count=load.decoders, gpus=0.0, cpus=0.1),
    )


def _ends(output: Path) -> Iterator[float]:
    """When each sample was committed, in seconds."""
    for path in (output / "commits").rglob("*.json"):
        yield datetime.fromisoformat(json.loads(path.read_text())["created_at"]).timestamp()
