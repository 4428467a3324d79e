"""How fast GPUs are: from operations and bytes to seconds.

Peaks are the vendors' figures for dense bf16. What is reached of them is fitted to published runs of the released code
(spec section 9), whose attention kernel this engine's "sdpa" is; figures without such an anchor are assumptions, and
say so. Everything here is an estimate for planning: tests hold it within 13 % of the published series it was fitted to.

An efficiency is that of a whole step at 720x1280x129, 87 % attention. Smaller shapes, where the faster matrix products
weigh more, take somewhat less than predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hv_batch.job.cost import attention_flops, count_tiles, decode_flops, exchange_bytes, linear_flops, rank_traffic
from hv_batch.job.model import ModelShape
from hv_batch.job.workload import Work
from hv_batch.protocol import ParallelPlan, UserError

# Bytes/s a rank sends to its group over NVLink, kernel launches and packing included. One figure fits the published
# series of H100, H800 and H20, 1 to 8 ranks (the links themselves are 4 times as fast).
NVLINK = 100e9
PCIE = 10e9  # a rank of eight over PCIe 4; assumed

# Bytes/s from pinned host memory to one GPU: 80 % of PCIe 4 x16; assumed.
HOST_LINK = 25e9

# Of the peak, while decoding. Fitted to two figures of an H100: 4.81 s for 544x960x129, 9.00 s for 720x1280x129.
DECODE_EFFICIENCY = 0.37

ENCODE_SECONDS = 0.1  # a prompt, on any of these GPUs: the LLaMA tower's 14 GB are read once


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


def forward_seconds(gpu: Gpu, model: ModelShape, tokens: int, ulysses: int, ring: int) -> float:
    """One pass of one item through the DiT, on a group of ulysses x ring ranks."""
    ranks = ulysses * ring
    rate = gpu.tflops * 1e12 * gpu.efficiency
    local = -(-tokens // ranks) / tokens  # with the padding that the tail shards carry
    attending = attention_flops(model, tokens) * local / (rate * (gpu.cudnn_gain if model.attention == "cudnn" else 1))
    computing = linear_flops(model, tokens) * local / rate + attending
    traffic = rank_traffic(model, tokens, ulysses, ring)
    # A ring passes keys on while it computes with those it has: all hops but the last can hide.
    hidden = attending * (ring - 1) / ring
    waiting = (traffic.ulysses + traffic.gather) / gpu.link + max(0.0, traffic.ring / gpu.link - hidden)
    # Streamed weights arrive while the block before computes.
    return max(computing + waiting, model.streamed_bytes / HOST_LINK)


def denoise_seconds(gpu: Gpu, model: ModelShape, work: Work, plan: ParallelPlan) -> float:
    """One sample, on a group of that plan; with two guidance branches where the plan shares them out."""
    seconds = work.forwards * forward_seconds(gpu, model, work.tokens, plan.ulysses_degree, plan.ring_degree)
    if plan.cfg_degree == 1:
        return seconds
    return seconds / plan.cfg_degree + work.steps * exchange_bytes(model, work.tokens) / gpu.link


def decode_seconds(gpu: Gpu, model: ModelShape, work: Work, ranks: int = 1) -> float:
    """One sample, its tiles dealt out to so many ranks: as long as the one takes that has most of them."""
    tiles = count_tiles(model, work.shape).total()
    share = -(-tiles // ranks) / tiles
    return share * decode_flops(model, work.shape) / (gpu.tflops * 1e12 * DECODE_EFFICIENCY)
