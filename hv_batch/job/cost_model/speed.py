"""Estimates the seconds of each stage on a GPU, from operations and bytes.

Peaks are the vendors' figures for dense bf16. The efficiencies are fitted to published runs of the released code,
which has the same attention kernel as this engine's "sdpa". Values without such a measurement are
assumptions and marked as such. All results are estimates for planning; tests keep them within 13 % of the published
series.

An efficiency is that of a whole step at 720x1280x129, of which attention is 87 %. Smaller shapes take somewhat less
than predicted, because their share of matrix products, which are faster, is larger.
"""

from __future__ import annotations

from hv_batch.attention_kernels import assumed_kernel
from hv_batch.job.config.hardware import Gpu
from hv_batch.job.cost_model.flops import (
    attention_flops,
    count_tiles,
    decode_flops,
    exchange_bytes,
    linear_flops,
    rank_traffic,
)
from hv_batch.job.cost_model.model import ForwardKind, ModelShape
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan

# Bytes/s from pinned host memory to one GPU: 80 % of PCIe 4 x16; assumed.
HOST_LINK = 25e9

# Fraction of the peak that a decode reaches. Fitted to two measurements on an H100: 4.81 s for 544x960x129, 9.00 s for
# 720x1280x129.
DECODE_EFFICIENCY = 0.37

DENSE_FORWARD = ForwardKind()

ENCODE_SECONDS = 0.1  # per prompt, on any of these GPUs: the 14 GB of the LLaMA tower are read once


def kernel_of(gpu: Gpu, model: ModelShape) -> str:
    """The attention kernel with which a plan computes: for `attention: auto`, one that needs no package."""
    return assumed_kernel(model.attention, gpu.capability, is_half=model.precision != "fp32")


def kernel_gain(gpu: Gpu, model: ModelShape) -> float:
    """The speed of the attention kernel relative to "sdpa". No figure of "fa4" is known, so that of "cudnn" is used."""
    gains = {"cudnn": gpu.cudnn_gain, "fa3": gpu.fa3_gain, "fa4": gpu.cudnn_gain}
    return gains.get(kernel_of(gpu, model), 1.0)


def forward_seconds(
    gpu: Gpu, model: ModelShape, tokens: int, ulysses: int, ring: int, kind: ForwardKind = DENSE_FORWARD
) -> float:
    """One forward of one item through the DiT, on a group of ulysses x ring ranks.

    Sparse attention is counted with the speed of the dense kernel. This is assumed.
    """
    ranks = ulysses * ring
    rate = gpu.tflops * 1e12 * gpu.efficiency
    local = -(-tokens // ranks) / tokens  # with the padding of the last shards
    gain = gpu.quantized_gain if kind.is_quantized else kernel_gain(gpu, model)
    attending = kind.density * attention_flops(model, tokens) * local / (rate * gain)
    computing = linear_flops(model, tokens) * local / rate + attending
    traffic = rank_traffic(model, tokens, ulysses, ring)
    # The ring sends keys while it computes with those it has, so all hops but the last can overlap with computation.
    hidden = attending * (ring - 1) / ring
    waiting = (traffic.ulysses + traffic.gather) / gpu.link + max(0.0, traffic.ring / gpu.link - hidden)
    # The weights of a block are streamed while the previous block computes.
    return max(computing + waiting, model.streamed_bytes / HOST_LINK)


def denoise_seconds(gpu: Gpu, model: ModelShape, work: Workload, plan: ParallelPlan) -> float:
    """Denoising one sample on a group of that plan."""
    seconds = sum(
        count * forward_seconds(gpu, model, work.tokens, plan.ulysses_degree, plan.ring_degree, kind)
        for kind, count in model.forwards(work).items()
    )
    if plan.cfg_degree == 1:
        return seconds
    return seconds / plan.cfg_degree + model.computed_steps(work.steps) * exchange_bytes(model, work.tokens) / gpu.link


def decode_seconds(gpu: Gpu, model: ModelShape, work: Workload, ranks: int = 1) -> float:
    """Decoding one sample whose tiles are divided among `ranks`: the time of the rank with the most tiles."""
    tiles = count_tiles(model, work.shape).total()
    share = -(-tiles // ranks) / tiles
    return share * decode_flops(model, work.shape) / (gpu.tflops * 1e12 * DECODE_EFFICIENCY)
