"""The table of GPUs that the cost model can compute with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hv_batch.protocol import UserError

# Bytes/s that a rank sends to its group over NVLink, with kernel launches and packing. This value fits the published
# series of H100, H800 and H20 for 1 to 8 ranks (the links themselves are 4 times as fast).
NVLINK = 100e9
PCIE = 10e9  # a rank of eight over PCIe 4; assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU model."""

    name: str
    tflops: float  # dense bf16 peak
    memory_gib: float
    efficiency: float  # fraction of the peak that a DiT step reaches on one GPU
    link: float  # bytes/s from one rank to the others of its group
    anchor: str  # the measurement that the efficiency is fitted to
    capability: int  # major compute capability, which decides the kernel of `attention: auto`
    cudnn_gain: float = 1.0  # speed of the attention kernel "cudnn" relative to "sdpa"; 1 if not measured
    fa3_gain: float = 1.0  # the same of "fa3"; 1 if not published
    quantized_gain: float = 1.0  # the same of 8-bit attention; 1 if not published


_H100 = "34.2 s a step at 720x1280x129 on one H100"
_HOPPER = 1.57  # at the tokens of 540p and of 720p, on an H200: 563 to 572 TFLOP/s for 359 to 363
# FA3 in FP8, and SageAttention, which is as fast: 1.3 to 1.6 times the speed of FA3 by published reports. The lower
# end; not measured with hv_batch.
_EIGHT_BITS = 2.2
_FA3 = 1.7  # published figures of 610 TFLOP/s and more on an H100; not measured with hv_batch

GPUS: Mapping[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu(
            name="H100",
            tflops=989,
            memory_gib=79.6,
            efficiency=0.355,
            link=NVLINK,
            anchor=_H100,
            capability=9,
            cudnn_gain=_HOPPER,
            fa3_gain=_FA3,
            quantized_gain=_EIGHT_BITS,
        ),
        Gpu(
            name="H200",
            tflops=989,
            memory_gib=140.4,
            efficiency=0.355,
            link=NVLINK,
            anchor=f"{_H100} (same cores)",
            capability=9,
            cudnn_gain=_HOPPER,
            fa3_gain=_FA3,
            quantized_gain=_EIGHT_BITS,
        ),
        Gpu(
            name="A100",
            tflops=312,
            memory_gib=80.0,
            efficiency=0.67,
            link=NVLINK,
            anchor="50 min for 720p on one A800, less 2 min of decoding",
            capability=8,
        ),
        Gpu(
            name="H20",
            tflops=148,
            memory_gib=95.6,
            efficiency=0.62,
            link=NVLINK,
            anchor="6639 s at 720x1280x129 on one H20, less 2 min of decoding",
            capability=9,
        ),
        Gpu(name="L40S", tflops=362, memory_gib=45.0, efficiency=0.5, link=PCIE, anchor="none: assumed", capability=8),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in upper or lower case. Raises UserError if it is not in the table."""
    if gpu := GPUS.get(name.lower()):
        return gpu
    raise UserError(f"GPU {name!r} is not known; known are {', '.join(gpu.name for gpu in GPUS.values())}.")
