"""Flow matching by Euler steps: the whole sampling method as plain functions, in the order they are called.

    latents = initial_noise(params)                        seeded, on the CPU
    sigma   = sigmas(steps, shift)                         1 -> 0
    texts   = condition([negative,] positive)              one batch item a guidance branch
    repeat:
        velocity = predict_velocity(model, latents, ...)   the DiT, then classifier-free guidance
        latents  = euler_step(latents, velocity, ...)

Latents, velocities and their arithmetic are float32 throughout; only the model computes in its own dtype. Shapes: B
guidance branches (1, or 2 with classifier-free guidance), C latent channels, T latent frames, H and W latent rows and
columns, L text tokens, D and P the widths of the text states and of the pooled vector.
Facts: the released HunyuanVideo run, spec section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from hv_batch.engine.dit import HYVideoDiT
    from hv_batch.engine.parallel import SequenceMesh
    from hv_batch.engine.text import TextEmbedding
    from hv_batch.protocol import SamplingParams

# The model was trained with times 0..1000 and reads both its time and its guidance in that unit.
TIME_UNIT = 1000.0


def initial_noise(params: SamplingParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise [1, C, T, H, W] in `dtype`, a function of the seed and the shape alone.

    Drawn on the CPU so that one seed means one noise on every device and every rank. `dtype` takes part in the draw:
    one seed gives values that differ by about 1e-3 between float16 and float32.
    """
    generator = torch.Generator("cpu").manual_seed(params.seed)
    return torch.randn((1, *params.latent_shape), generator=generator, dtype=dtype)


def sigmas(steps: int, shift: float) -> Tensor:
    """The noise levels before, between and after `steps` steps: float32 [steps + 1] from 1 down to 0.

    The released model is sampled in this direction (the official `--flow-reverse`). A `shift` above 1 spends more of
    the steps at high noise, where a large picture is decided.
    """
    even = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32)
    return shift * even / (1.0 + (shift - 1.0) * even)


@dataclass(frozen=True, slots=True)
class Condition:
    """What the model is told besides latents and time, one batch item a guidance branch."""

    states: Tensor  # [B, L, D], right padded with zeros
    lengths: tuple[int, ...]  # valid text tokens of each item
    pooled: Tensor  # [B, P]
    guidance: Tensor | None  # [B], scale * 1000; None for a model without guidance embedding


def condition(
    model: HYVideoDiT, branches: Sequence[TextEmbedding], guidance_scale: float, device: torch.device
) -> Condition:
    """Batch the texts of the guidance branches on `device`, padded to the longest.

    The guidance is cast to the model's dtype before it is scaled, as in the released run: in bfloat16 the model sees
    6016 for 6.0. The texts keep the encoder's dtype; the model averages them before it rounds them.
    """
    guidance = None
    if model.config.guidance_embed:
        guidance = torch.full((len(branches),), guidance_scale, dtype=model.dtype, device=device) * TIME_UNIT
    return Condition(
        states=pad_sequence([text.states for text in branches], batch_first=True).to(device),
        lengths=tuple(text.states.shape[0] for text in branches),
        pooled=torch.stack([text.pooled for text in branches]).to(device),
        guidance=guidance,
    )


def predict_velocity(
    model: HYVideoDiT,
    latents: Tensor,
    sigma: Tensor,
    texts: Condition,
    params: SamplingParams,
    mesh: SequenceMesh,
) -> Tensor:
    """The guided velocity at noise level `sigma` for latents [1, C, T, H, W]; same shape, float32."""
    branches = len(texts.lengths)
    inputs = latents.expand(branches, -1, -1, -1, -1)
    time = (sigma * TIME_UNIT).to(latents.device).expand(branches)
    velocity = model(inputs, time, texts.states, texts.lengths, texts.pooled, texts.guidance, mesh).float()
    if branches == 1:
        return velocity
    negative, positive = velocity.chunk(2)
    return guide(negative, positive, params.cfg_scale, params.guidance_rescale)


def guide(negative: Tensor, positive: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance with the rescale of Lin et al. (arXiv 2305.08891, section 3.4).

    `rescale` mixes in, by that fraction, a copy brought back to the standard deviation of the positive branch, against
    the over-exposure that a large `scale` causes.
    """
    guided = negative + scale * (positive - negative)
    if rescale == 0.0:
        return guided
    dims = tuple(range(1, guided.ndim))
    restored = guided * (positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return rescale * restored + (1.0 - rescale) * guided


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Follow `velocity` from noise level `sigma` to `sigma_next`; everything float32."""
    return latents + velocity * float(sigma_next - sigma)


@torch.no_grad()
def denoise(
    model: HYVideoDiT,
    params: SamplingParams,
    positive: TextEmbedding,
    negative: TextEmbedding | None,
    *,
    mesh: SequenceMesh,
    device: torch.device,
    on_step: Callable[[int], None],
) -> Tensor:
    """Final latents [C, T, H, W], float32 on `device`, where the model is, equal on every rank of `mesh`.

    `negative` is used, and required, exactly when `params.uses_cfg`. `on_step(n)` is called after step n = 1..steps;
    whatever it raises ends the sampling and passes through. Raises ValueError as soon as a step's result is not finite.
    """
    if params.uses_cfg and negative is None:
        raise ValueError(f"cfg_scale {params.cfg_scale} needs an embedding of the negative prompt")
    branches = [negative, positive] if params.uses_cfg and negative is not None else [positive]
    texts = condition(model, branches, params.guidance_scale, device)
    levels = sigmas(params.num_inference_steps, params.flow_shift)
    latents = initial_noise(params).to(device)
    for step in range(params.num_inference_steps):
        velocity = predict_velocity(model, latents, levels[step], texts, params, mesh)
        latents = euler_step(latents, velocity, levels[step], levels[step + 1])
        # Waiting for the device here costs nothing beside a step, saves the rest of a lost sample, and means that
        # `on_step` reports work that is done rather than queued. All ranks hold equal latents, so all of them raise.
        if not torch.isfinite(latents).all():
            raise ValueError(_not_finite(step + 1, params, model.dtype))
        on_step(step + 1)
    return latents[0]


def _not_finite(step: int, params: SamplingParams, dtype: torch.dtype) -> str:
    return (
        f"latents are not finite after step {step} of {params.num_inference_steps}: {params.width}x{params.height}, "
        f"{params.num_frames} frames, seed {params.seed}, guidance_scale {params.guidance_scale}, "
        f"cfg_scale {params.cfg_scale}, flow_shift {params.flow_shift}, model dtype {dtype}"
    )
