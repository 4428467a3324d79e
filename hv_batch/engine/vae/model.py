"""The causal 3D VAE "884-16c-hy": compresses pixels to latents 8x in space and 4x in time.

The module tree and all parameter names are those of the released checkpoint. `CausalVAE.decode` decodes a video as a
whole; real sizes are decoded in tiles by `hv_batch.engine.vae.tiling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from hv_batch.architecture import VAEConfig, check_fields
from hv_batch.engine.vae.blocks import NORM_EPS, CausalConv3d, DownBlock, MidBlock, UpBlock
from hv_batch.engine.vae.kernels import Stride, in_layout, mix_channels, reused_memory
from hv_batch.protocol import UserError
from hv_batch.sampling_params import LATENT_CHANNELS

PIXEL_CHANNELS = 3

# The factors of (frames, height, width) of the four levels, in order from the pixels for the encoder and from the
# latents for the decoder. Both use the same list. Together 4 x 8 x 8.
LEVELS: tuple[Stride | None, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2), None)

# Keys of vae/config.json that change the architecture, and the only value of each that this module implements.
_IMPLEMENTED: Mapping[str, Any] = {
    "act_fn": "silu",
    "in_channels": PIXEL_CHANNELS,
    "out_channels": PIXEL_CHANNELS,
    "latent_channels": LATENT_CHANNELS,
    "spatial_compression_ratio": 8,
    "time_compression_ratio": 4,
    "mid_block_add_attention": True,
    "down_block_types": ["DownEncoderBlockCausal3D"] * len(LEVELS),
    "up_block_types": ["UpDecoderBlockCausal3D"] * len(LEVELS),
}


def parse_vae_config(values: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
    """Parse the content of a checkpoint's vae/config.json. Keys that do not affect the architecture are ignored.

    `where` is the path of the file, for messages. Raises UserError if a field has the wrong type, or if the file
    describes another architecture than this module implements.
    """
    for key, implemented in _IMPLEMENTED.items():
        value = values.get(key, implemented)
        if value != implemented and list(_as_list(value)) != _as_list(implemented):
            raise UserError(
                f"{where}: {key} is {value!r}, but only {implemented!r} is supported. Copy the config.json of "
                "HunyuanVideo's VAE in its released layout."
            )
    if values.get("shift_factor"):
        raise UserError(
            f"{where}: shift_factor is {values['shift_factor']!r}, but only a VAE without one is supported. "
            "Copy the config.json of HunyuanVideo's VAE."
        )
    known = {name: values[name] for name in (field.name for field in fields(VAEConfig)) if name in values}
    check_fields(VAEConfig, known, where)
    if "block_out_channels" in known:
        known["block_out_channels"] = tuple(known["block_out_channels"])
    return VAEConfig(**known)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(PIXEL_CHANNELS, widths[0])
        ins = (widths[0], *widths)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, after, config.layers_per_block, groups, stride)
            for before, after, stride in zip(ins, widths, LEVELS, strict=False)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * LATENT_CHANNELS)  # mean and log-variance

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(x, self.conv_norm_out)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv3d(LATENT_CHANNELS, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        ins = (widths[0], *widths)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after, config.layers_per_block + 1, groups, factor)
            for before, after, factor in zip(ins, widths, LEVELS, strict=False)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(widths[-1], PIXEL_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(x, self.conv_norm_out)


class CausalVAE(nn.Module):
    """Encoder and decoder. For inference only: some activations are computed in place."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(LATENT_CHANNELS, LATENT_CHANNELS, kernel_size=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.post_quant_conv.weight.device

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the mode of the posterior [B, 16, T, H/8, W/8] of pixels [B, 3, 4*(T - 1) + 1, H, W] in [-1, 1].

        The result is not multiplied by the scaling factor.
        """
        with reused_memory():
            hidden = self.encoder(in_layout(x))
        mean, _log_variance = mix_channels(self.quant_conv, hidden).chunk(2, dim=1)
        return mean

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return pixels [B, 3, 4*(T - 1) + 1, 8h, 8w], about in [-1, 1], of latents [B, 16, T, h, w], without tiling.

        The latents must be divided by the scaling factor and have this model's dtype.
        """
        with reused_memory():
            pixels: Tensor = self.decoder(mix_channels(self.post_quant_conv, in_layout(z)))
        return pixels
