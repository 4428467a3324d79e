"""diffusers' VAE with the weights of hv_batch's VAE, and an emulation of the release's half precision."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from hv_batch.architecture import VAEConfig
from hv_batch.engine.vae.model import CausalVAE

NARROW = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8)


def vae_pair(config: VAEConfig) -> tuple[CausalVAE, AutoencoderKLHunyuanVideo]:
    """Return hv_batch's and diffusers' VAE with equal random weights; no norm is the identity."""
    torch.manual_seed(0)
    theirs = AutoencoderKLHunyuanVideo(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    ours = CausalVAE(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours.requires_grad_(False), theirs.requires_grad_(False)


def under_autocast(vae: AutoencoderKLHunyuanVideo, dtype: torch.dtype) -> AutoencoderKLHunyuanVideo:
    """Emulate torch.autocast("cuda", dtype), which the release uses, on a CPU.

    GroupNorm and the operations after it run in float32. Convolutions and matrix products read and write `dtype` and
    sum in float32. They use float32 kernels here, because the float16 kernels are a hundred times slower on a CPU.
    """
    for module in vae.to(dtype).modules():
        if isinstance(module, nn.GroupNorm):
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        elif isinstance(module, nn.Conv3d | nn.Linear):
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype).float(),))
            module.register_forward_hook(lambda _, _inputs, output: output.to(dtype))
    return vae


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Relative root mean square."""
    return float((result.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())
