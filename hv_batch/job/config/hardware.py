"""The GPUs that the cost model knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hv_batch.protocol import UserError

# Bytes/s a rank sends to its group over NVLink, kernel launches and packing included. One figure fits the published
# series of H100, H800 and H20, 1 to 8 ranks (the links themselves are 4 times as fast).
NVLINK = 100e9


PCIE = 10e9  # a rank of eight over PCIe 4; assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str
    tflops: float  # dense bf16 peak
    memory_gib: float
    efficiency: float  # of the peak, in a DiT step on one GPU
    link: float  # bytes/s to the other ranks
    anchor: str  # what the efficiency is fitted to
    cudnn_gain: float = 1.0  # times as fast attends "cudnn" as "sdpa"; where nothing was measured, as fast


_H100 = "34.2 s a step at 720x1280x129 on one H100"


_HOPPER = 1.57  # at the tokens of 540p and of 720p, on an H200: 563 to 572 TFLOP/s for 359 to 363


GPUS: Mapping[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu(name="H100", tflops=989, memory_gib=79.6, efficiency=0.355, link=NVLINK, anchor=_H100, cudnn_gain=_HOPPER),
        Gpu(
            name="H200",
            tflops=989,
            memory_gib=140.4,
            efficiency=0.355,
            link=NVLINK,
            anchor=f"{_H100} (same cores)",
            cudnn_gain=_HOPPER,
        ),
        Gpu(
            name="A100",
            tflops=312,
            memory_gib=80.0,
            efficiency=0.67,
            link=NVLINK,
            anchor="50 min for 720p on one A800, less 2 min of decoding",
        ),
        Gpu(
            name="H20",
            tflops=148,
            memory_gib=95.6,
            efficiency=0.62,
            link=NVLINK,
            anchor="6639 s at 720x1280x129 on one H20, less 2 min of decoding",
        ),
        Gpu(name="L40S", tflops=362, memory_gib=45.0, efficiency=0.5, link=PCIE, anchor="none: assumed"),
    )
}


def find_gpu(name: str) -> Gpu:
    """Raises UserError for a GPU that is not in the table."""
    if gpu := GPUS.get(name.lower()):
        return gpu
    raise UserError(f"GPU {name!r} is not known; known are {', '.join(gpu.name for gpu in GPUS.values())}.")
