"""Time the engine stage by stage on one device, and diffusers in the same process if it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hv_batch.bench.measure import Probe, Times, Work, measure_matmul_peak, median_ratio, probe, time_in_turns
from hv_batch.bench.presets import PRESETS, Preset
from hv_batch.bench.stage_workloads import STAGES, Stage, has_diffusers
from hv_batch.engine.attention.kernels import KERNELS
from hv_batch.protocol import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Measurements of diffusers at the same stage. Ratios are hv_batch / diffusers: below 1, hv_batch is faster."""

    best_s: float
    median_s: float
    gflop: float
    peak_gb: float | None
    ratio_best: float
    ratio_median: float  # median of the ratios of the rounds

    def render(self) -> str:
        return (
            f"{'  diffusers':<13}{self.best_s:9.3f}{self.median_s:9.3f}{self.gflop:11,.0f}{'':18}"
            f"{_gb(self.peak_gb)}   hv_batch takes {self.ratio_best:.2f} of it (best), {self.ratio_median:.2f} (median)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """Measurements of one stage of hv_batch, and of diffusers if it ran."""

    stage: str
    size: str
    dtype: str
    best_s: float
    median_s: float
    gflop: float  # operations that ran; the two implementations differ in this
    gflops: float  # GFLOP per second in the best round
    of_matmul_peak: float
    peak_gb: float | None
    diffusers: Comparison | None
    note: str

    def render(self) -> str:
        lines = [
            f"{self.stage:<13}{self.best_s:9.3f}{self.median_s:9.3f}{self.gflop:11,.0f}{self.gflops:10,.0f}"
            f"{self.of_matmul_peak:8.0%}{_gb(self.peak_gb)}   {self.dtype}, {self.size}"
        ]
        if self.diffusers:
            lines.append(self.diffusers.render())
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


HEADER = f"{'':13}{'best s':>9}{'median s':>9}{'GFLOP':>11}{'GFLOP/s':>10}{'of peak':>8}{'memory':>10}"


def bench_engine(
    preset: str, device: torch.device, stages: Sequence[str], rounds: int, *, fp8: bool = False, attention: str = "sdpa"
) -> Iterator[StageReport]:
    """Yield the report of each stage as soon as it is timed.

    `fp8` and `attention` apply to the DiT of hv_batch only. Raises UserError immediately if a name is unknown, and
    during iteration if hv_batch does not fit into the memory of the device.
    """
    check_choice("preset", preset, PRESETS)
    check_choice("attention", attention, KERNELS)
    for name in stages:
        check_choice("stage", name, STAGES)
    sizes = replace(PRESETS[preset], fp8=fp8, attention=attention)
    return (_time_stage(name, sizes, rounds, device) for name in stages)


def find_device(name: str) -> torch.device:
    """Return the named device; "auto" is the GPU if there is one. Raises UserError if CUDA is not available."""
    check_choice("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to this process. Use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """Return the name of the device (on a CPU, the number of threads) and the version of PyTorch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device}: {name}, PyTorch {torch.__version__}"


def missing_reference() -> str:
    """Return a hint if diffusers is not installed, else an empty string."""
    if has_diffusers():
        return ""
    return "diffusers is not installed, so hv_batch is timed alone. `pip install diffusers` adds the comparison."


def check_choice(option: str, value: str, allowed: Any) -> None:
    """Raises UserError if `value` is not in `allowed`."""
    if value not in allowed:
        raise UserError(f"--{option} {value!r} is unknown. Allowed values: {', '.join(allowed)}.")


def _time_stage(name: str, preset: Preset, rounds: int, device: torch.device) -> StageReport:
    try:
        return _report(name, STAGES[name](preset, device), rounds, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Stage {name} ({preset.summary}) does not fit into the memory of {device}: {error}. Choose another "
            f"--preset: {', '.join(PRESETS)}."
        ) from error


def _report(name: str, stage: Stage, rounds: int, device: torch.device) -> StageReport:
    peak = measure_matmul_peak(device, stage.dtype)
    counted = probe(stage.ours, device)
    theirs, counted_theirs, note = _prepare(stage, device)
    works = [stage.ours] if theirs is None else [stage.ours, theirs]
    times = time_in_turns(works, rounds, device)
    ours, peak = times[0], max(peak, measure_matmul_peak(device, stage.dtype))
    comparison = None if counted_theirs is None else _compare(ours, times[1], counted_theirs)
    return StageReport(
        stage=name,
        size=stage.size,
        dtype=str(stage.dtype).removeprefix("torch."),
        best_s=ours.best,
        median_s=ours.median,
        gflop=counted.flop / 1e9,
        gflops=counted.flop / 1e9 / ours.best,
        of_matmul_peak=counted.flop / ours.best / peak,
        peak_gb=_to_gb(counted.peak_bytes),
        diffusers=comparison,
        note=note,
    )


def _prepare(stage: Stage, device: torch.device) -> tuple[Work | None, Probe | None, str]:
    """Return the function of diffusers after a warm-up run and its counts, or the reason why there is none."""
    if stage.theirs is None:
        return None, None, ""
    try:
        work = stage.theirs()
        return work, probe(work, device), ""
    except torch.OutOfMemoryError:
        return None, None, "diffusers ran out of memory next to hv_batch; only hv_batch was timed"


def _compare(ours: Times, theirs: Times, counted: Probe) -> Comparison:
    return Comparison(
        best_s=theirs.best,
        median_s=theirs.median,
        gflop=counted.flop / 1e9,
        peak_gb=_to_gb(counted.peak_bytes),
        ratio_best=ours.best / theirs.best,
        ratio_median=median_ratio(ours, theirs),
    )


def _to_gb(amount: int | None) -> float | None:
    return None if amount is None else amount / 1e9


def _gb(amount: float | None) -> str:
    return f"{'?':>10}" if amount is None else f"{amount:7.2f} GB"
