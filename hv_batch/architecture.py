"""Widths, tile sizes and parameter counts of the networks. Does not import torch.

The engine builds its modules from these dataclasses, and the cost model computes with them. The defaults are those of
the released model. Tests compare every parameter count with the torch modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from hv_batch.protocol import UserError
from hv_batch.sampling_params import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION

DIT_CLASS = "HYVideoDiT"  # `_class_name` of a config.json beside the DiT's weights that holds fields of `DiTConfig`
TIMESTEP_WIDTH = 256  # width of the sinusoid that feeds the timestep embedders
REFINER_MLP_RATIO = 4  # constant in the released refiner, independent of the blocks' ratio
VAE_LEVELS = 4  # levels of the encoder and of the decoder
CLIP_TOKENS = 77  # the position table of CLIP ViT-L/14
PROMPT_TOKENS = 351  # of a template and its prompt, padded or truncated: one length for both templates
VIDEO_TEMPLATE_TOKENS = 95  # before the prompt, cropped from the states
IMAGE_TEMPLATE_TOKENS = 36
VIDEO_TEXT_TOKENS = PROMPT_TOKENS - VIDEO_TEMPLATE_TOKENS  # 256: what the DiT gets for a video
MAX_TEXT_TOKENS = PROMPT_TOKENS - IMAGE_TEMPLATE_TOKENS  # 315: what it gets for an image, which is more
SKIPPED_LAYERS = 2  # last layers of the LLaMA tower, which are never loaded
# Limits of untrusted configs. A module is built for each layer, so a damaged number must not ask for a billion of them.
MAX_WIDTH = 2**20
MAX_LAYERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """Width and depth of the transformer. The field names are those of its config and of the engine option `dit`.

    Raises UserError if the widths do not fit together.
    """

    in_channels: int = LATENT_CHANNELS
    out_channels: int = LATENT_CHANNELS
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows, columns
    hidden_size: int = 3072
    heads_num: int = 24
    mlp_width_ratio: float = 4.0
    mm_double_blocks_depth: int = 20
    mm_single_blocks_depth: int = 40
    rope_dim_list: tuple[int, int, int] = (16, 56, 56)  # a head's channels over t, h, w
    text_states_dim: int = 4096
    text_states_dim_2: int = 768
    guidance_embed: bool = True
    refiner_depth: int = 2

    def __post_init__(self) -> None:
        if self.mlp_width_ratio <= 0:
            raise UserError(f"DiT config: mlp_width_ratio is {self.mlp_width_ratio}; it must be above 0.")
        if self.hidden_size % self.heads_num:
            raise UserError(
                f"DiT config: hidden_size {self.hidden_size} is not a multiple of heads_num {self.heads_num}; "
                f"choose a width that heads_num divides."
            )
        if sum(self.rope_dim_list) != self.head_dim or any(dim % 2 for dim in self.rope_dim_list):
            raise UserError(
                f"DiT config: rope_dim_list {list(self.rope_dim_list)} must be three even numbers that add up to the "
                f"{self.head_dim} channels of a head (hidden_size {self.hidden_size} / heads_num {self.heads_num})."
            )

    @property
    def depth(self) -> int:
        return self.mm_double_blocks_depth + self.mm_single_blocks_depth

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads_num

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_width_ratio)

    @property
    def double_linears(self) -> int:
        """Weights of the Linears of a double-stream block."""
        width = self.hidden_size
        return 2 * width * (6 * width + 3 * width + width + 2 * self.mlp_width)

    @property
    def double_block(self) -> int:
        """Parameters of a double-stream block: the Linears, their biases, and the norms of q and k."""
        return self.double_linears + 2 * (11 * self.hidden_size + self.mlp_width) + 4 * self.head_dim

    @property
    def single_linears(self) -> int:
        width = self.hidden_size
        return width * (3 * width + self.mlp_width) + width * (width + self.mlp_width) + 3 * width * width

    @property
    def single_block(self) -> int:
        return self.single_linears + 7 * self.hidden_size + self.mlp_width + 2 * self.head_dim

    @property
    def blocks(self) -> int:
        return self.mm_double_blocks_depth * self.double_block + self.mm_single_blocks_depth * self.single_block

    @property
    def block_linears(self) -> int:
        """Number of weights that an FP8 checkpoint stores in one byte each."""
        return self.mm_double_blocks_depth * self.double_linears + self.mm_single_blocks_depth * self.single_linears

    @property
    def parameters(self) -> int:
        width = self.hidden_size
        patch = math.prod(self.patch_size)
        timestep = _linear(TIMESTEP_WIDTH, width) + _linear(width, width)
        refiner_mlp = REFINER_MLP_RATIO * width
        refiner_block = (
            4 * width  # two affine norms
            + _linear(width, 3 * width)
            + _linear(width, width)
            + _linear(width, refiner_mlp)
            + _linear(refiner_mlp, width)
            + _linear(width, 2 * width)
        )
        return (
            self.blocks
            + _linear(self.in_channels * patch, width)
            + 2 * (_linear(self.text_states_dim, width))  # into the refiner and into its modulation
            + _linear(width, width)
            + self.refiner_depth * refiner_block
            + timestep * (3 if self.guidance_embed else 2)  # of the model, the refiner and the guidance
            + _linear(self.text_states_dim_2, width)
            + _linear(width, width)
            + _linear(width, patch * self.out_channels)
            + _linear(width, 2 * width)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """Widths of the causal VAE. The field names are those of its config.json.

    Raises UserError if the widths do not fit together.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # of the encoder; a decoder block has one more
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986  # latents of the DiT = scaling_factor * latents of the VAE

    def __post_init__(self) -> None:
        if len(self.block_out_channels) != VAE_LEVELS:
            raise UserError(
                f"VAE config: block_out_channels must be {VAE_LEVELS} widths, not {self.block_out_channels}."
            )
        if any(width < 1 or width % self.norm_num_groups for width in self.block_out_channels):
            raise UserError(
                f"VAE config: every width of block_out_channels {self.block_out_channels} must be a multiple of "
                f"norm_num_groups ({self.norm_num_groups})."
            )
        if self.layers_per_block < 1 or self.scaling_factor <= 0:
            raise UserError("VAE config: layers_per_block and scaling_factor must be above 0.")

    @property
    def parameters(self) -> int:
        """Parameters of the encoder and the decoder. Both are loaded; a render uses the decoder only."""
        widths, layers = self.block_out_channels, self.layers_per_block
        reverse = widths[::-1]
        encoder = _conv(3, widths[0]) + _conv(widths[-1], 2 * LATENT_CHANNELS) + 2 * widths[-1]
        decoder = _conv(LATENT_CHANNELS, reverse[0]) + _conv(reverse[-1], 3) + 2 * reverse[-1]
        encoder += sum(_resnets(a, b, layers) for a, b in pairwise((widths[0], *widths)))
        decoder += sum(_resnets(a, b, layers + 1) for a, b in pairwise((reverse[0], *reverse)))
        # All levels but the innermost of the encoder, and the outermost of the decoder, end in a resampler.
        resamplers = sum(_conv(width, width) for width in (*widths[:-1], *reverse[:-1]))
        attention = 4 * _linear(widths[-1], widths[-1]) + 2 * widths[-1]
        middles = 2 * (_resnets(widths[-1], widths[-1], 2) + attention)
        quant = _linear(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS) + _linear(LATENT_CHANNELS, LATENT_CHANNELS)
        return encoder + decoder + resamplers + middles + quant


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGeometry:
    """Tile sizes of the VAE in pixels and frames, and the fraction of a tile that overlaps the next tile.

    The field names are those of the engine option `vae_tile`. The defaults are those of the release. Raises UserError
    if a size or an overlap is not a whole number of latents.
    """

    spatial_px: int = 256
    temporal_frames: int = 64
    overlap: float = 0.25

    def __post_init__(self) -> None:
        # Above 0.5, a tile would overlap the tile after the next one.
        if not 0.0 <= self.overlap <= 0.5:
            raise UserError(f"VAE tiling: overlap is {self.overlap}; it must be a number from 0 to 0.5.")
        for field, size, compression in (
            ("spatial_px", self.spatial_px, SPATIAL_COMPRESSION),
            ("temporal_frames", self.temporal_frames, TEMPORAL_COMPRESSION),
        ):
            if size < compression or size % compression:
                raise UserError(f"VAE tiling: {field} is {size}; it must be a positive multiple of {compression}.")
            if not (size / compression * self.overlap).is_integer():
                # The overlap would be rounded differently in latents and in pixels, and tiles would not align.
                raise UserError(
                    f"VAE tiling: {field} {size} is {size // compression} latents, and an overlap of {self.overlap} "
                    f"of them is not a whole number. Choose an overlap of 0.25 and a multiple of {4 * compression}."
                )

    @property
    def space(self) -> Axis:
        return Axis.of(self.spatial_px, SPATIAL_COMPRESSION, self.overlap)

    @property
    def time(self) -> Axis:
        return Axis.of(self.temporal_frames, TEMPORAL_COMPRESSION, self.overlap)


@dataclass(frozen=True, slots=True)
class Axis:
    """The tiling of one axis: `tile` and `stride` in latents, `stride_px` and `fade_px` in pixels (or frames)."""

    tile: int
    stride: int
    stride_px: int
    fade_px: int

    @classmethod
    def of(cls, size_px: int, compression: int, overlap: float) -> Axis:
        tile = size_px // compression
        overlapping = int(tile * overlap)
        stride = tile - overlapping
        return cls(tile, stride, stride * compression, overlapping * compression)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The LLaMA text encoder as loaded: without its last two layers, final norm and head.

    The field names are those of its config.json.
    """

    vocab_size: int = 128_320
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8

    @property
    def parameters(self) -> int:
        width, heads = self.hidden_size, self.num_attention_heads
        attention = 2 * width * width + 2 * width * (width // heads * self.num_key_value_heads)
        layer = attention + 3 * width * self.intermediate_size + 2 * width
        return self.vocab_size * width + (self.num_hidden_layers - SKIPPED_LAYERS) * layer


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipShape:
    """The CLIP text encoder. The field names are those of its config.json."""

    vocab_size: int = 49_408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    max_position_embeddings: int = 77

    @property
    def parameters(self) -> int:
        width, inner = self.hidden_size, self.intermediate_size
        layer = 4 * _linear(width, width) + _linear(width, inner) + _linear(inner, width) + 4 * width
        embeddings = (self.vocab_size + self.max_position_embeddings) * width
        return embeddings + self.num_hidden_layers * layer + 2 * width


def check_fields(config_class: type, values: Mapping[str, Any], where: str) -> None:
    """Check untrusted values of fields of `config_class`, a dataclass of this kind, one by one.

    `where` begins the message, for example the path of a config.json. Unknown names are ignored. Raises UserError that
    lists every value of another type or outside of its bounds. How the fields fit together is checked by the class.
    """
    faults = [
        f"{field.name} is {_shown(values[field.name])}, allowed is {allowed}"
        for field in fields(config_class)
        if field.name in values and (allowed := _find_fault(field.name, str(field.type), values[field.name]))
    ]
    if faults:
        raise UserError(f"{where}: {'; '.join(faults)}. Correct it, or copy the file of the release again.")


def _find_fault(name: str, kind: str, value: Any) -> str | None:
    """Return the allowed values if `value` is not one of them. `kind` is the annotation of the field."""
    if kind.endswith(" | None") and value is None:
        return None
    low, high = (1, MAX_LAYERS) if "layers" in name else (0, MAX_LAYERS) if name.endswith("depth") else (1, MAX_WIDTH)
    whole = f"from {low} to {high}"
    match kind.removesuffix(" | None"):
        case "bool":
            return None if isinstance(value, bool) else "true or false"
        case "float":
            return None if _is_number(value) and 0 <= value <= MAX_LAYERS else f"a number from 0 to {MAX_LAYERS}"
        case "tuple[int, int, int]":
            fits = isinstance(value, list | tuple) and len(value) == 3
            return None if fits and _are_whole(value, low, high) else f"a list of three whole numbers {whole}"
        case "tuple[int, ...]":
            fits = isinstance(value, list | tuple) and 0 < len(value) <= MAX_LAYERS
            return None if fits and _are_whole(value, low, high) else f"a list of whole numbers {whole}"
        case _:
            return None if _are_whole([value], low, high) else f"a whole number {whole}"


def _are_whole(values: list[Any] | tuple[Any, ...], low: int, high: int) -> bool:
    return all(isinstance(one, int) and not isinstance(one, bool) and low <= one <= high for one in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _linear(ins: int, outs: int) -> int:
    return ins * outs + outs


def _conv(ins: int, outs: int) -> int:
    return 27 * ins * outs + outs


def _resnets(ins: int, outs: int, layers: int) -> int:
    """Parameters of `layers` resnets. The first one changes the width from `ins` to `outs`."""
    shortcut = _linear(ins, outs) if ins != outs else 0
    first = 2 * ins + 2 * outs + _conv(ins, outs) + _conv(outs, outs) + shortcut
    return first + (layers - 1) * (4 * outs + 2 * _conv(outs, outs))
