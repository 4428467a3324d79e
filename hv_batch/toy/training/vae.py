"""Train the causal VAE on the toy world: first on images, which are cheap and teach most of it, then on clips.

The modules are those of diffusers, whose tensors have the released names. After the training, every latent channel is
shifted and scaled to mean 0 and standard deviation 1 in the range that the DiT receives. The two 1x1x1 convolutions
around the latents absorb this, so the pixels do not change.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hv_batch.sampling_params import LATENT_CHANNELS
from hv_batch.toy.checkpoint import vae_file, write_vae
from hv_batch.toy.training.lean import lean_autocast, make_lean_vae
from hv_batch.toy.training.scenes import VIDEO_FRAMES, Phase, Scenes, batches, to_pixels
from hv_batch.toy.world import Scene, draw

logger = logging.getLogger(__name__)

# Two norm groups: a norm over fewer than eight channels removes most of the colour of a uniform area.
WIDTHS: dict[str, Any] = {"block_out_channels": (16, 32, 48, 48), "layers_per_block": 1, "norm_num_groups": 2}
SCALING = 0.476986  # the released factor: latents of the DiT = SCALING * latents of the VAE
KL_WEIGHT = 1e-5
RESIDUAL_GAIN = 0.2
FIRST_LOG_VARIANCE = -6.0  # initial log variance of the latents; at 0, noise would dominate the untrained encoder
LEARNING_RATE = 2e-3


@dataclass(frozen=True, slots=True)
class Settings:
    phases: tuple[Phase, ...] = (
        Phase(600, 32, 1, 32, 32),
        Phase(200, 32, 1, 64, 64),
        Phase(200, 32, 1, 128, 128),
        Phase(200, 16, 9, 64, 64),
        Phase(170, 8, 33, 128, 128),
    )
    measured: int = 64  # videos from whose latents mean and standard deviation are measured
    seed: int = 0


def train_vae(root: Path, settings: Settings, device: torch.device) -> Any:
    """Train the VAE, write it below `root` in the released layout, and return it (an AutoencoderKLHunyuanVideo)."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(settings.seed)
    model = make_lean_vae(AutoencoderKLHunyuanVideo(**WIDTHS, scaling_factor=SCALING).to(device))
    _initialise(model)
    total = sum(phase.steps for phase in settings.phases)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total, pct_start=0.05)
    for number, phase in enumerate(settings.phases):
        for step, pixels in enumerate(pixel_batches(phase, settings.seed + number, device), start=1):
            with lean_autocast(device):
                posterior = model.encode(pixels).latent_dist
                shown = model.decode(posterior.sample()).sample.float()
            error = F.l1_loss(shown, pixels)
            loss = F.mse_loss(shown, pixels) + error + KL_WEIGHT * posterior.kl().float().mean() / pixels[0].numel()
            optimizer.zero_grad()
            loss.backward()
            if phase.num_frames == 1:
                _zero_past_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                psnr = -10 * torch.log10(F.mse_loss(shown, pixels) / 4).item()
                logger.info(f"VAE, {phase.num_frames} frames: step {step}, error {error.item():.4f}, {psnr:.1f} dB")
    last = settings.phases[-1]
    measured = Phase(settings.measured, 1, last.num_frames, last.height, last.width)
    normalise_latents(model, pixel_batches(measured, settings.seed + len(settings.phases), device))
    write_vae(root, WIDTHS, {name: tensor.half().cpu() for name, tensor in model.state_dict().items()})
    return model


def _initialise(model: Any) -> None:
    """Initialize the model as nearly a linear map from pixels to latents and back, one frame at a time.

    The residual blocks contribute little, and every kernel uses the current frame only.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 5:
            gain = RESIDUAL_GAIN if ".conv2." in name else 1.0
            torch.nn.init.zeros_(parameter)
            torch.nn.init.normal_(parameter[:, :, -1:], std=gain * parameter[0, :, -1].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(model.quant_conv.bias[LATENT_CHANNELS:], FIRST_LOG_VARIANCE)


def _zero_past_gradients(model: Any) -> None:
    """Set the gradients of the kernel taps of past frames to zero.

    The causal padding of a single frame repeats that frame, so all taps would learn the same weights, and each
    convolution would then blur moving things over three frames.
    """
    for parameter in model.parameters():
        if parameter.ndim == 5:
            parameter.grad[:, :, :-1] = 0


def load_vae(root: Path, device: torch.device) -> Any | None:
    """Return the VAE that `train_vae` has written below `root`, or None if there is none."""
    from diffusers import AutoencoderKLHunyuanVideo

    file = vae_file(root)
    if not file.is_file():
        return None
    model = AutoencoderKLHunyuanVideo(**WIDTHS, scaling_factor=SCALING)
    model.load_state_dict(torch.load(file, weights_only=True))
    return make_lean_vae(model.to(device))


def pixel_batches(phase: Phase, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Yield `phase.steps` batches of pixels [B, 3, F, H, W] in [-1, 1] of training scenes.

    Clips are cut out of whole videos, so that things move as fast as in a whole video.
    """
    whole = 1 if phase.num_frames == 1 else max(VIDEO_FRAMES, phase.num_frames)

    def clip(scene: Scene, rng: np.random.Generator) -> np.ndarray:
        begin = int(rng.integers(whole - phase.num_frames + 1))
        return draw(scene, whole, phase.height, phase.width, rng)[begin : begin + phase.num_frames]

    for frames in batches(Scenes(seed, phase.steps * phase.batch, whole, clip), phase.batch, device):
        yield to_pixels(frames, device)


@torch.no_grad()
def normalise_latents(model: Any, measured: Iterable[Tensor]) -> None:
    """Fold the normalization of each latent channel into `quant_conv`, and its inverse into `post_quant_conv`.

    Mean and standard deviation are measured on the pixel batches `measured`.
    """
    latents = [model.encode(pixels).latent_dist.mode().transpose(0, 1).flatten(1) for pixels in measured]
    values = torch.cat(latents, dim=1)
    mean, factor = values.mean(1), 1 / (SCALING * values.std(1))
    weight, bias = model.quant_conv.weight, model.quant_conv.bias
    bias[:LATENT_CHANNELS] = (bias[:LATENT_CHANNELS] - mean) * factor
    weight[:LATENT_CHANNELS] *= factor[:, None, None, None, None]
    bias[LATENT_CHANNELS:] += 2 * factor.log()  # these channels are log variances
    after = model.post_quant_conv
    after.bias += after.weight.flatten(1) @ mean
    after.weight /= factor[None, :, None, None, None]
