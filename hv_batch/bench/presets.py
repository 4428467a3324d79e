"""Named sizes for `hv-batch bench engine`: the widths of the models, the video size and the dtype of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hv_batch.architecture import DiTConfig, VAEConfig
from hv_batch.toy.checkpoint import TOY_DIT, TOY_VAE


@dataclass(frozen=True, slots=True, kw_only=True)
class TextWidths:
    """Sizes of the LLaMA and the CLIP tower; the defaults are those of the released model."""

    llama_width: int = 4096
    llama_mlp: int = 14336
    llama_layers: int = 32  # the engine skips the last two
    llama_heads: int = 32
    llama_kv_heads: int = 8
    clip_width: int = 768
    clip_layers: int = 12
    clip_heads: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Model sizes and inputs of the three stages. Latent sizes are (frames, rows, columns)."""

    summary: str
    text: TextWidths = field(default_factory=TextWidths)
    dit: DiTConfig = field(default_factory=DiTConfig)
    dit_latents: tuple[int, int, int]
    text_tokens: int  # valid tokens; diffusers computes on all padded ones
    vae: VAEConfig = field(default_factory=VAEConfig)
    vae_latents: tuple[int, int, int]
    text_dtype: torch.dtype = torch.float16
    dit_dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float16
    fp8: bool = False  # FP8 matrix products in the blocks of the DiT; hv_batch only
    attention: str = "sdpa"  # attention kernel of the DiT; hv_batch only


_FP32: dict[str, Any] = {"text_dtype": torch.float32, "dit_dtype": torch.float32, "vae_dtype": torch.float32}

PRESETS: Mapping[str, Preset] = {
    "toy": Preset(
        summary="the widths of the toy checkpoint; takes seconds on any CPU",
        text=TextWidths(
            llama_width=64,
            llama_mlp=128,
            llama_layers=4,
            llama_heads=4,
            llama_kv_heads=2,
            clip_width=32,
            clip_layers=2,
            clip_heads=4,
        ),
        dit=DiTConfig(**TOY_DIT),
        dit_latents=(3, 16, 16),
        text_tokens=10,
        vae=VAEConfig(**TOY_VAE),
        vae_latents=(3, 8, 8),
        **_FP32,
    ),
    "mid": Preset(
        summary="a fortieth of the released model, in float32; takes a minute per round on two cores",
        text=TextWidths(
            llama_width=1024, llama_mlp=3584, llama_layers=8, llama_heads=16, llama_kv_heads=4, clip_layers=6
        ),
        dit=DiTConfig(
            hidden_size=1024,
            heads_num=8,
            mm_double_blocks_depth=4,
            mm_single_blocks_depth=8,
            text_states_dim=1024,
        ),
        dit_latents=(5, 32, 32),
        text_tokens=40,
        vae=VAEConfig(block_out_channels=(32, 64, 128, 128)),
        vae_latents=(5, 40, 56),
        **_FP32,
    ),
    "540p": Preset(
        summary="the released model at 544x960x129, for a GPU",
        dit_latents=(33, 68, 120),
        text_tokens=100,
        vae_latents=(33, 68, 120),
    ),
    "720p": Preset(
        summary="the released model at 720x1280x129, for a GPU",
        dit_latents=(33, 90, 160),
        text_tokens=100,
        vae_latents=(33, 90, 160),
    ),
}
