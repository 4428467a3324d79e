"""Peak memory of each kind of worker, computed before a run takes any GPU.

The formulas for activations follow the engine's code: they sum the tensors that are alive at the widest points of a
forward, so they must be changed with it. Tests compare them with every allocation of real forwards (groups at toy
width; one rank at the released width and size, traced without computing) and with the peaks of a GPU's allocator. The
tests cannot measure what the libraries allocate: `RESERVE_BYTES` is an assumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hv_batch.architecture import MAX_TEXT_TOKENS, PROMPT_TOKENS
from hv_batch.job.cost_model.model import ITEMSIZE, ModelShape
from hv_batch.job.workload import count_tokens
from hv_batch.sampling_params import TEMPORAL_COMPRESSION, Shape
from hv_batch.step_schedule import kept_velocities

GIB = 2**30

# CUDA context, workspaces of cuBLAS, buffers of NCCL, fragmentation of the allocator. Not measured.
RESERVE_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on one device."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + RESERVE_BYTES


def denoiser_footprint(model: ModelShape, tokens: int, ulysses: int, ring: int) -> Footprint:
    """One rank of a group of `ulysses` x `ring` ranks, for a video of so many tokens."""
    resident = model.dit_bytes
    if model.offload:
        resident += 2 * model.largest_block_bytes - model.streamed_bytes
    if model.fp8:  # one weight at a time is dequantised; the widest Linear's exists before and after scaling
        width = model.dit.hidden_size
        resident += 2 * width * (3 * width + model.dit.mlp_width) * ITEMSIZE[model.precision]
    # The sampler's whole float32 tensors on every rank: latents before the step, velocity, its product, latents after.
    # The step cache holds velocities and the latents before its last computed step; CFG gating holds one difference.
    tensors = 5 if model.cfg_until else 4
    if cache := model.step_cache:
        tensors += kept_velocities(cache) + (1 if cache.correct else 0)
    latents = tensors * tokens * _token_values(model) * 4
    activations = dit_activations(model, tokens, ulysses, ring) + latents
    return Footprint(resident, activations)


def dit_activations(model: ModelShape, tokens: int, ulysses: int, ring: int, text: int = MAX_TEXT_TOKENS) -> int:
    """Peak bytes of one forward of one item. Guidance branches run one after the other."""
    dit, item, mlp = model.dit, ITEMSIZE[model.precision], model.dit.mlp_width_ratio
    local = -(-tokens // (ulysses * ring))
    rows = local + text
    attending = max(_attention_tensors(item, ulysses, ring), _rotary_tensors(item))
    if sparse := model.methods.sparse:
        selecting = selection_bytes(dit.heads_num // ulysses, tokens, sparse.block) / (rows * dit.hidden_size * item)
        # Of the chunk: q, k, v if they are copies; k and v with the image first; attended rows before and after they
        # are joined with those of the text.
        attending = max(attending, (3 if ulysses > 1 else 0) + 4 + selecting)
    widest = 0.0  # in rows of hidden channels, in the model's precision
    if dit.mm_double_blocks_depth:
        # In the image's MLP: stream before and after attention, attended, modulated, hidden layer, result; and of the
        # text: stream and attended.
        widest = max(widest, local * (5 + mlp) + text * 2)
        widest = max(widest, rows * (1 + 3 + attending))  # stream; q, k, v
    if dit.mm_single_blocks_depth:
        fused = 1 + 3 + mlp  # stream; q, k, v and the MLP's input
        widest = max(widest, rows * (fused + 1 + 1 + mlp))  # attended; concatenated with the MLP's hidden layer
        widest = max(widest, rows * (fused + attending))
    rotary = 2 * local * dit.head_dim * 4  # cos and sin of half of the head's channels, in float32 and as one complex
    return int(widest * dit.hidden_size * item) + rotary + tokens * _token_values(model) * item


def _attention_tensors(item: int, ulysses: int, ring: int) -> float:
    """Tensors of a rank's rows that joint attention holds besides q, k and v."""
    wide, cast = 4 / item, 4 / item if item < 4 else 0  # in float32, and a copy if the model's precision is another
    chunk = 3 if ulysses > 1 else 0  # q, k, v of the chunk's tokens and 1/u of the heads
    trade = chunk + 4 if ulysses > 1 else 1  # attended rows; returned rows packed, received, unpacked
    if ring == 1:
        return trade
    moving = 2 * (2 if ring > 2 else 1)  # k and v, and those that are being received unless it is the last hop
    return max(trade, chunk + moving + 2 * wide + 1 + cast)  # two partial results and their sum


def selection_bytes(heads: int, tokens: int, block: int) -> int:
    """Peak bytes of the choice of key blocks in sparse attention, by the `heads` of a rank."""
    # For each pair of blocks. First, one head after the other: three tables of 4 x 4 parts, besides the probabilities
    # of the heads before. Then, for all heads: two probabilities, the sorted values and indices, and the choice.
    estimating, choosing = 3 * 16 * 4 + heads * 4, heads * (4 + 4 + 4 + 8 + 1)
    return (-(-tokens // block)) ** 2 * max(estimating, choosing)


def _rotary_tensors(item: int) -> float:
    """Tensors that the rotary embedding of q and k holds: a float32 copy of both, unless they are float32."""
    return 2 * 4 / item if item < 4 else 0


def _token_values(model: ModelShape) -> int:
    """Number of latent values of one token."""
    return model.dit.in_channels * math.prod(model.dit.patch_size)


def encoder_footprint(model: ModelShape) -> Footprint:
    """Both text towers, encoding one prompt."""
    llama, item = model.llama, ITEMSIZE[model.text_encoder_precision]
    tokens = PROMPT_TOKENS
    # In a layer's MLP: gate, up and their product, besides the stream and its float32 norm.
    return Footprint(
        model.text_bytes, tokens * (3 * llama.intermediate_size * item + llama.hidden_size * (2 * item + 8))
    )


def decoder_footprint(model: ModelShape, shape: Shape) -> Footprint:
    """The VAE, decoding a video tile by tile."""
    return Footprint(model.vae_bytes, decode_activations(model, shape))


def rank_footprint(model: ModelShape, shape: Shape, ulysses: int, ring: int, *, decodes: bool) -> Footprint:
    """One rank of a group. If it also `decodes`, it holds the VAE besides the DiT and computes with one at a time."""
    denoiser = denoiser_footprint(model, count_tokens(shape), ulysses, ring)
    if not decodes:
        return denoiser
    decoder = decoder_footprint(model, shape)
    return Footprint(denoiser.weights + decoder.weights, max(denoiser.activations, decoder.activations))


def decode_activations(model: ModelShape, shape: Shape) -> int:
    """Peak bytes while the largest tile of a video is decoded."""
    height, width, frames = shape
    tile, item = model.tile, ITEMSIZE[model.vae_precision]
    most_frames = tile.time.tile
    latent_frames = (frames - 1) // TEMPORAL_COMPRESSION + 1
    in_tile = latent_frames if latent_frames <= most_frames else most_frames + 1
    tile_frames = (in_tile - 1) * TEMPORAL_COMPRESSION + 1
    tiled = max(height, width) > tile.spatial_px
    tall, broad = (min(side, tile.spatial_px) if tiled else side for side in (height, width))
    # The peak is in the last level, at full resolution. Its first resnet holds: input; the input normed and padded by 2
    # frames and by one pixel on each side; hidden. A later resnet: the level's input, its own input, hidden, hidden
    # normed and padded, result.
    narrow, before = model.vae.block_out_channels[:2]
    front = 2 if tile_frames > 1 else 0
    padding = (tile_frames + front) * (tall + 2) * (broad + 2) / (tile_frames * tall * broad)
    channels = max((1 + padding) * before + narrow, before + (3 + padding) * narrow)
    decoding = channels * tile_frames * tall * broad * item
    # Frames of a temporal tile while it is assembled, and of the previous tile, which the caller still holds.
    frames_held = 3 * tile_frames * height * width * item
    whole = frames_held * ((2 if latent_frames > most_frames else 1) + tile.overlap if tiled else 1)
    return int(decoding + whole)
