"""How fast GPUs are: from operations and bytes to seconds.

Peaks are the vendors' figures for dense bf16. What is reached of them is fitted to published runs of the released code
(spec section 9), whose attention kernel this engine's "sdpa" is; figures without such an anchor are assumptions, and
say so. Everything here is an estimate for planning: tests hold it within 13 % of the published series it was fitted to.

An efficiency is that of a whole step at 720x1280x129, 87 % attention. Smaller shapes, where the faster matrix products
weigh more, take somewhat less than predicted.
"""

from __future__ import annotations

from hv_batch.job.config.hardware import Gpu
from hv_batch.job.cost_model.flops import (
    attention_flops,
    count_tiles,
    decode_flops,
    exchange_bytes,
    linear_flops,
    rank_traffic,
)
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan

# Bytes/s from pinned host memory to one GPU: 80 % of PCIe 4 x16; assumed.
HOST_LINK = 25e9

# Of the peak, while decoding. Fitted to two figures of an H100: 4.81 s for 544x960x129, 9.00 s for 720x1280x129.
DECODE_EFFICIENCY = 0.37

ENCODE_SECONDS = 0.1  # a prompt, on any of these GPUs: the LLaMA tower's 14 GB are read once


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


def denoise_seconds(gpu: Gpu, model: ModelShape, work: Workload, plan: ParallelPlan) -> float:
    """One sample, on a group of that plan; with two guidance branches where the plan shares them out."""
    seconds = work.forwards * forward_seconds(gpu, model, work.tokens, plan.ulysses_degree, plan.ring_degree)
    if plan.cfg_degree == 1:
        return seconds
    return seconds / plan.cfg_degree + work.steps * exchange_bytes(model, work.tokens) / gpu.link


def decode_seconds(gpu: Gpu, model: ModelShape, work: Workload, ranks: int = 1) -> float:
    """One sample, its tiles dealt out to so many ranks: as long as the one takes that has most of them."""
    tiles = count_tiles(model, work.shape).total()
    share = -(-tiles // ranks) / tiles
    return share * decode_flops(model, work.shape) / (gpu.tflops * 1e12 * DECODE_EFFICIENCY)
