"""The causal VAE learns to code the toy world: images first, where most of what there is to learn is cheap, then clips.

The modules are diffusers', whose tensors have the released names. Afterwards every latent channel is moved and scaled
to mean 0 and deviation 1 as the DiT will see it. That is folded into the two 1x1x1 convolutions around the latents, so
the pixels stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hv_batch.protocol import LATENT_CHANNELS
from hv_batch.toy.checkpoint import vae_file, write_vae
from hv_batch.toy.training.lean import lean_autocast, make_lean_vae
from hv_batch.toy.training.scenes import VIDEO_FRAMES, Phase, Scenes, batches, to_pixels
from hv_batch.toy.world import Scene, draw

# Two groups: a norm over fewer channels than eight leaves little of what colour an even field has.
WIDTHS: dict[str, Any] = {"block_out_channels": (16, 32, 48, 48), "layers_per_block": 1, "norm_num_groups": 2}
SCALING = 0.476986  # the released factor: latents as the DiT sees them = this * latents as the VAE sees them
KL_WEIGHT = 1e-5
RESIDUAL_GAIN = 0.2
FIRST_LOG_VARIANCE = -6.0  # of the latents: at 0, noise would drown what the encoder has to say at first
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
    measured: int = 64  # videos whose latents tell mean and deviation
    seed: int = 0


def train_vae(root: Path, settings: Settings, device: torch.device, say: Callable[[str], None]) -> Any:
    """Train, write below `root` as released, and return the model: diffusers' AutoencoderKLHunyuanVideo."""
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
                _keep_to_the_present(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                quality = -10 * torch.log10(F.mse_loss(shown, pixels) / 4).item()
                say(f"VAE, {phase.num_frames} frames: step {step}, error {error.item():.4f}, {quality:.1f} dB")
    last = settings.phases[-1]
    measured = Phase(settings.measured, 1, last.num_frames, last.height, last.width)
    normalise_latents(model, pixel_batches(measured, settings.seed + len(settings.phases), device))
    write_vae(root, WIDTHS, {name: tensor.half().cpu() for name, tensor in model.state_dict().items()})
    return model


def _initialise(model: Any) -> None:
    """At first nearly a linear map of pixels to latents and back, along the stream that the residual blocks add to, and
    frame by frame: every kernel sees the present frame alone.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 5:
            gain = RESIDUAL_GAIN if ".conv2." in name else 1.0
            torch.nn.init.zeros_(parameter)
            torch.nn.init.normal_(parameter[:, :, -1:], std=gain * parameter[0, :, -1].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(model.quant_conv.bias[LATENT_CHANNELS:], FIRST_LOG_VARIANCE)


def _keep_to_the_present(model: Any) -> None:
    """No gradient for what kernels make of past frames. A single frame is its own past, so all taps would learn alike,
    and each convolution would then blur what moves over three frames.
    """
    for parameter in model.parameters():
        if parameter.ndim == 5:
            parameter.grad[:, :, :-1] = 0


def load_vae(root: Path, device: torch.device) -> Any | None:
    """What an earlier `train_vae` has written below `root`."""
    from diffusers import AutoencoderKLHunyuanVideo

    file = vae_file(root)
    if not file.is_file():
        return None
    model = AutoencoderKLHunyuanVideo(**WIDTHS, scaling_factor=SCALING)
    model.load_state_dict(torch.load(file, weights_only=True))
    return make_lean_vae(model.to(device))


def pixel_batches(phase: Phase, seed: int, device: torch.device) -> Iterator[Tensor]:
    """`phase.steps` batches [B, 3, F, H, W] in [-1, 1] of the scenes that are not held out.

    Clips are cut out of whole videos, so that things move at the pace that they will have.
    """
    whole = 1 if phase.num_frames == 1 else max(VIDEO_FRAMES, phase.num_frames)

    def clip(scene: Scene, rng: np.random.Generator) -> np.ndarray:
        begin = int(rng.integers(whole - phase.num_frames + 1))
        return draw(scene, whole, phase.height, phase.width, rng)[begin : begin + phase.num_frames]

    for frames in batches(Scenes(seed, phase.steps * phase.batch, whole, clip), phase.batch, device):
        yield to_pixels(frames, device)


@torch.no_grad()
def normalise_latents(model: Any, measured: Iterable[Tensor]) -> None:
    """Fold mean and deviation of each latent channel into `quant_conv`, and their inverse into `post_quant_conv`."""
    latents = [model.encode(pixels).latent_dist.mode().transpose(0, 1).flatten(1) for pixels in measured]
    values = torch.cat(latents, dim=1)
    mean, factor = values.mean(1), 1 / (SCALING * values.std(1))
    weight, bias = model.quant_conv.weight, model.quant_conv.bias
    bias[:LATENT_CHANNELS] = (bias[:LATENT_CHANNELS] - mean) * factor
    weight[:LATENT_CHANNELS] *= factor[:, None, None, None, None]
    bias[LATENT_CHANNELS:] += 2 * factor.log()  # of the logarithm of the variance
    after = model.post_quant_conv
    after.bias += after.weight.flatten(1) @ mean
    after.weight /= factor[None, :, None, None, None]
