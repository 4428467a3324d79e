"""Measure the time, operations and memory of a function that computes on one device.

Two implementations are timed in alternation (A B A B) and compared pair by pair. Other load on the machine slows both
runs of a pair equally; two separate blocks of runs would also compare the load of two different times.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

Work = Callable[[], object]

_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}  # large enough to reach the peak, small enough for a fraction of a second
_MATMUL_TRIES = 5


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that one implementation took, one value per round."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Probe:
    """Counts of one run that was not timed."""

    flop: int  # multiplications and additions of the matrix products, convolutions and attention that ran
    peak_bytes: int | None  # peak memory above that in use before the run; None if the system does not report it


def time_in_turns(works: Sequence[Work], rounds: int, device: torch.device) -> list[Times]:
    """Run each of `works` `rounds` times, in alternation, and return the times of each."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, seconds, strict=True):
            taken.append(time_once(work, device))
    return [Times(tuple(taken)) for taken in seconds]


def time_once(work: Work, device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start


def median_ratio(ours: Times, theirs: Times) -> float:
    """Return the median of the ratios ours / theirs of the rounds."""
    return statistics.median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True))


def probe(work: Work, device: torch.device) -> Probe:
    """Count the operations and the peak memory of a run.

    A first run warms up: it selects kernels and allocates their buffers and the memory of the counter itself.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_KERNELS):
        work()
    before = _reset_peak(device)
    with FlopCounterMode(display=False, custom_mapping=_CPU_KERNELS) as counter:
        work()
    _wait_for(device)
    peak = _peak(device)
    return Probe(counter.get_total_flops(), None if before is None or peak is None else max(0, peak - before))


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured peak of the device: the FLOP/s of the fastest of a few large square matrix products."""
    size = _MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(time_once(lambda: torch.mm(a, b), device) for _ in range(_MATMUL_TRIES))


def _count_attention(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _count_convolution(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(x_shape, weight_shape, out_shape)


# CPU kernels that PyTorch's counter does not cover.
_CPU_KERNELS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    torch.ops.aten.mkldnn_convolution: _count_convolution,
}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Reset the peak of the memory use; returns the bytes in use now, or None if the system does not report them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # Return freed memory to the system first. A run that reuses it would appear to need less.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak resident memory
    except (OSError, AttributeError):
        return None
    return _peak(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
