"""The operations of each stage for a sample, and the bytes that the ranks of a group send each other.

Pure functions of the model's widths and the shape of a video. `hv_batch.job.cost_model.speed` turns
them into seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from hv_batch.architecture import VIDEO_TEXT_TOKENS, Axis, VAEConfig
from hv_batch.job.config.group_rules import divisors
from hv_batch.job.cost_model.model import ITEMSIZE, ModelShape
from hv_batch.job.workload import Workload
from hv_batch.sampling_params import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, SamplingParams, Shape


def count_work(samples: Iterable[SamplingParams]) -> Counter[Workload]:
    """The number of samples of each workload. Its size is bounded by the distinct workloads of the manifest (P7)."""
    return Counter(map(Workload.of, samples))


def forward_flops(model: ModelShape, tokens: int) -> float:
    """One forward of one item through the DiT, without the text tokens (below 1 % at video sizes), as in the spec."""
    return linear_flops(model, tokens) + attention_flops(model, tokens)


def denoise_flops(model: ModelShape, work: Workload) -> float:
    """All forwards of one sample, with the density of sparse attention."""
    linear, attention = linear_flops(model, work.tokens), attention_flops(model, work.tokens)
    return sum(count * (linear + kind.density * attention) for kind, count in model.forwards(work).items())


def mean_density(model: ModelShape, work: Workload) -> float:
    """The fraction of the attention that the forwards of one sample compute."""
    forwards = model.forwards(work)
    return sum(kind.density * count for kind, count in forwards.items()) / forwards.total()


def linear_flops(model: ModelShape, tokens: int) -> float:
    dit = model.dit
    # Q, K, V, the output projection, and the MLP of the image stream: the same in double and single blocks.
    return 2.0 * tokens * dit.depth * dit.hidden_size * (4 * dit.hidden_size + 2 * dit.mlp_width)


def attention_flops(model: ModelShape, tokens: int) -> float:
    return 4.0 * tokens**2 * model.dit.hidden_size * model.dit.depth


def decode_flops(model: ModelShape, shape: Shape) -> float:
    """Decoding all tiles of a video."""
    return sum(count * tile_flops(model.vae, tile) for tile, count in count_tiles(model, shape).items())


def count_tiles(model: ModelShape, shape: Shape) -> Counter[Shape]:
    """The number of tiles of each size, in latent (frames, height, width): the tile geometry of the release."""
    height, width, frames = shape
    latent = ((frames - 1) // TEMPORAL_COMPRESSION + 1, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
    time, space = model.tile.time, model.tile.space
    in_time = [latent[0]]
    if latent[0] > time.tile:
        in_time = [min(time.tile + 1, latent[0] - start) for start in range(0, latent[0] - 1, time.stride)]
    tiled = max(latent[1:]) > space.tile
    rows, columns = (_cut(side, space) if tiled else [side] for side in latent[1:])
    return Counter((t, h, w) for t in in_time for h in rows for w in columns)


def _cut(side: int, axis: Axis) -> list[int]:
    return [min(axis.tile, side - start) for start in range(0, side, axis.stride)]


def tile_flops(vae: VAEConfig, tile: Shape) -> float:
    """Decoding one tile of latents (frames, height, width), as the engine computes it."""
    frames, height, width = tile
    widths = vae.block_out_channels[::-1]
    taps = 27.0 if frames > 1 else 9.0  # of a single frame, the taps in time have one input and are summed beforehand
    area = frames * height * width
    macs = area * taps * LATENT_CHANNELS * widths[0]
    macs += area * (4 * taps + 4) * widths[0] ** 2  # two resnets; the projections of the attention
    macs += area**2 * widths[0]  # causal in time: half of all pairs, twice (scores, values)
    before = widths[0]
    for level, after in enumerate(widths):
        area = frames * height * width
        shortcut = before if before != after else 0
        macs += area * after * (taps * (before + after) + shortcut + vae.layers_per_block * 2 * taps * after)
        if level < len(widths) - 1:
            doubles_time = level > 0  # from the latents on: space first, then twice space and time
            # The upsampler merges taps that apply to equal inputs: 2 per doubled axis instead of 3.
            merged = 4 * (1 if frames == 1 else 2 if doubles_time else 3)
            frames, height, width = (2 * frames - 1 if doubles_time else frames), 2 * height, 2 * width
            macs += frames * height * width * after**2 * merged
        before = after
    return 2.0 * (macs + frames * height * width * taps * widths[-1] * 3)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends in one forward of the DiT."""

    ulysses: float  # not overlapped with computation
    ring: float  # overlapped with attention
    gather: float  # the velocity, at the end

    @property
    def total(self) -> float:
        return self.ulysses + self.ring + self.gather


def rank_traffic(model: ModelShape, tokens: int, ulysses: int, ring: int, text: int = VIDEO_TEXT_TOKENS) -> Traffic:
    """The traffic of the rank that sends most, with prompts of `text` tokens."""
    dit, item = model.dit, ITEMSIZE[model.precision]
    ranks = ulysses * ring
    local = -(-tokens // ranks)
    row = dit.hidden_size * item
    # To each of the other ranks, 1/u of the heads: q, k, v of its own rows, and later the attended rows and text rows.
    to_others = (ulysses - 1) / ulysses
    per_block = to_others * (3 * local * row + (local + text) * row)
    # Keys and values of a chunk of u shards, 1/u of the heads, are sent ring - 1 times.
    passed = (ring - 1) * 2 * local * row
    replicated = text * row / ulysses if ring > 1 else 0  # the text rows of ring rank 0, to all
    return Traffic(
        ulysses=dit.depth * (per_block + replicated),
        ring=float(dit.depth * passed),
        gather=float((ranks - 1) * local * _velocity_bytes(model)),
    )


def exchange_bytes(model: ModelShape, tokens: int) -> float:
    """Bytes that a rank sends once per step to its counterpart in the other half of the group, with cfg_degree 2."""
    return float(tokens * _velocity_bytes(model))


def _velocity_bytes(model: ModelShape) -> int:
    """Bytes of the velocity of one token."""
    return model.dit.out_channels * math.prod(model.dit.patch_size) * ITEMSIZE[model.precision]


def plan_ranks(heads: int, ranks: int, ring_multiple: int = 1) -> tuple[int, int]:
    """(Ulysses degree, ring degree) of a group: the largest Ulysses degree that divides the heads.

    Ulysses sends less than the ring. The ring degree is a multiple of `ring_multiple`, which must divide the ranks.
    """
    ulysses = max(degree for degree in divisors(ranks // ring_multiple) if heads % degree == 0)
    return ulysses, ranks // ulysses
