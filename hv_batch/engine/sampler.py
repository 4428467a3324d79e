"""Flow matching by Euler steps: the whole sampling method as plain functions, in the order they are called.

    latents = initial_noise(params)                        seeded, on the CPU
    sigma   = sigmas(steps, shift)                         1 -> 0
    texts   = condition(own_branches(...))                 one batch item a video and guidance branch
    repeat:
        velocity = predict_velocity(model, latents, ...)   the DiT, then classifier-free guidance
        latents  = euler_step(latents, velocity, ...)

Latents, velocities and their arithmetic are float32 throughout; only the model computes in its own dtype. Shapes: N
videos that are denoised side by side, B guidance branches of them (N, or 2N with classifier-free guidance), C latent
channels, T latent frames, H and W latent rows and columns, L text tokens, D and P the widths of the text states and of
the pooled vector.
Facts: the released HunyuanVideo run, spec section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hv_batch.engine import step_cache
from hv_batch.protocol import NonFiniteError, SamplingParams, StepState

if TYPE_CHECKING:
    from hv_batch.engine.dit.model import HYVideoDiT
    from hv_batch.engine.parallel.sequence import SequenceMesh
    from hv_batch.engine.text_encoders import TextEmbedding

# The model was trained with times 0..1000 and reads both its time and its guidance in that unit.
TIME_UNIT = 1000.0


def initial_noise(
    params: SamplingParams, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise [1, C, T, H, W], a function of the seed, the shape and how it is drawn.

    Drawn on the CPU, one seed means one noise everywhere; a CUDA generator draws another, which depends on the GPU
    model as well. `dtype` takes part in the draw: one seed gives values that differ by about 1e-3 between float16 and
    float32.
    """
    generator = torch.Generator(device).manual_seed(params.seed)
    return torch.randn((1, *params.latent_shape), generator=generator, dtype=dtype, device=device)


def sigmas(steps: int, shift: float, reverse: bool = True) -> Tensor:
    """The noise levels before, between and after `steps` steps: float32 [steps + 1] from 1 down to 0.

    The released model is sampled in this direction (the official `--flow-reverse`); without `reverse` they run from 0
    to 1, which it was not trained for. A `shift` above 1 spends more of the steps at high noise, where a large picture
    is decided.
    """
    even = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32)
    shifted = shift * even / (1.0 + (shift - 1.0) * even)
    return shifted if reverse else 1.0 - shifted


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to sample, beside what a user chooses for one video; belongs to the identity of every video (P3)."""

    noise: str = "cpu-fp32"  # of NOISES
    reverse: bool = True
    step_cache: float = 0.0  # a `StepCache`'s threshold; 0: every step is computed

    def can_resume(self, step: int) -> bool:
        """Whether what comes after `step` steps depends on their latents alone."""
        return self.step_cache == 0 or step_cache.can_resume(step)


# "official" is the released draw: on the model's device, in the dtype of the prompt embedding (spec section 4).
NOISES = ("cpu-fp32", "official")


@dataclass(frozen=True, slots=True)
class Condition:
    """What the model is told besides latents and time, one batch item a video and guidance branch."""

    states: Tensor  # [B, L, D], right padded with zeros
    lengths: tuple[int, ...]  # valid text tokens of each item
    pooled: Tensor  # [B, P]
    guidance: Tensor | None  # [B], scale * 1000; None for a model without guidance embedding


def branch_embeddings(
    params: SamplingParams,
    positives: Sequence[TextEmbedding],
    negatives: Sequence[TextEmbedding] | None,
    mesh: SequenceMesh,
) -> Sequence[TextEmbedding]:
    """The texts that this rank's grid computes: those of all guidance branches, or of one where grids share them.

    Raises ValueError for parameters without the texts they need, and for two grids with one branch to compute.
    """
    if params.uses_cfg and negatives is None:
        raise ValueError(f"cfg_scale {params.cfg_scale} needs an embedding of the negative prompt")
    if mesh.cfg_degree > 1 and not params.uses_cfg:
        raise ValueError(f"cfg_degree {mesh.cfg_degree} needs a cfg_scale above 1, not {params.cfg_scale}")
    if not params.uses_cfg or negatives is None:
        return positives
    return [*negatives, *positives] if mesh.cfg_degree == 1 else (negatives, positives)[mesh.branch]


def condition(
    model: HYVideoDiT, branches: Sequence[TextEmbedding], guidance_scale: float, device: torch.device
) -> Condition:
    """Batch the texts of all guidance branches on `device`, padded to the longest.

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
    caches: Sequence[step_cache.StepCache] = (),
) -> Tensor:
    """The guided velocity at noise level `sigma` for latents [N, C, T, H, W]; same shape, float32.

    `texts` are those of the branches that this rank computes; see `branch_embeddings`. `caches` belong to the same items.
    """
    items = len(texts.lengths)
    inputs = latents.repeat(items // len(latents), 1, 1, 1, 1)
    time = (sigma * TIME_UNIT).to(latents.device).expand(items)
    own = model(inputs, time, texts.states, texts.lengths, texts.pooled, texts.guidance, mesh, caches)
    velocity = mesh.exchange(own).float()
    if len(velocity) == len(latents):
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
def trajectory(
    model: HYVideoDiT,
    batch: Sequence[SamplingParams],
    positives: Sequence[TextEmbedding],
    negatives: Sequence[TextEmbedding] | None,
    *,
    mesh: SequenceMesh,
    device: torch.device,
    recipe: SamplingOptions = SamplingOptions(),
    resume: StepState | None = None,
) -> Generator[Tensor, None, None]:
    """The latents [N, C, T, H, W] of N videos after each step, float32 on `device`, equal on every rank of `mesh`.

    The videos may differ in prompts and seed, and each is the same bits whatever it is batched with. `negatives` are
    used, and required, exactly when the parameters use CFG. `resume` is what an earlier trajectory of the same
    arguments had reached, its latents [N, C, T, H, W]: the steps after it are made, and are the same bits. Every step
    makes new latents, so those that were given out stay as they are. Whoever stops asking stops the sampling. Raises
    ValueError for a batch of unlike videos, for a `resume` that cannot be theirs and where `branch_embeddings` does, and
    NonFiniteError as soon as a step's result is not finite.
    """
    params = batch[0]
    if any(
        replace(other, prompt="", negative_prompt="", seed=0) != replace(params, prompt="", negative_prompt="", seed=0)
        for other in batch
    ):
        raise ValueError("videos that are denoised side by side may differ in prompts and seed only")
    texts = condition(model, branch_embeddings(params, positives, negatives, mesh), params.guidance_scale, device)
    levels = sigmas(params.num_inference_steps, params.flow_shift, recipe.reverse)
    if resume is None:
        latents = _start(batch, positives[0].states.dtype, device, mesh, recipe)
    else:
        latents = _resumed(batch, resume, device, recipe)
    caches = [step_cache.StepCache(recipe.step_cache) for _ in texts.lengths] if recipe.step_cache else []
    for step in range(resume.step if resume else 0, params.num_inference_steps):
        if step_cache.is_fresh(step, params.num_inference_steps):
            for cache in caches:
                cache.forget()
        velocity = predict_velocity(model, latents, levels[step], texts, params, mesh, caches)
        latents = euler_step(latents, velocity, levels[step], levels[step + 1])
        # Waiting for the device here costs nothing beside a step, saves the rest of a lost sample, and means that
        # a step that is reported is done rather than queued. All ranks hold equal latents, so all of them raise.
        if not torch.isfinite(latents).all():
            lost = next(one for one, item in zip(batch, latents, strict=True) if not torch.isfinite(item).all())
            raise NonFiniteError(_not_finite(step + 1, lost, model.dtype))
        yield latents


def _start(
    batch: Sequence[SamplingParams],
    text_dtype: torch.dtype,
    device: torch.device,
    mesh: SequenceMesh,
    recipe: SamplingOptions,
) -> Tensor:
    """The initial latents of a batch, float32 on `device`."""
    if recipe.noise == "cpu-fp32":
        return torch.cat([initial_noise(params) for params in batch]).to(device)
    # Each video has a generator of its own, so what it starts from does not depend on the batch. Unlike GPU models
    # would draw unlike noise: rank 0's is everybody's.
    drawn = torch.cat([initial_noise(params, text_dtype, device) for params in batch])
    return mesh.adopt(drawn).float()


def _resumed(
    batch: Sequence[SamplingParams], state: StepState, device: torch.device, recipe: SamplingOptions
) -> Tensor:
    """The latents of `state`, float32 on `device`, copied into memory that is aligned and laid out as torch does it."""
    found, shape = state.latents.shape, (len(batch), *batch[0].latent_shape)
    steps = batch[0].num_inference_steps
    if not 0 < state.step < steps or found != shape or not recipe.can_resume(state.step):
        raise ValueError(f"cannot resume after step {state.step} of {steps} with latents {found} for {shape}")
    return torch.tensor(state.latents, dtype=torch.float32, device=device)


def denoise(
    model: HYVideoDiT,
    params: SamplingParams,
    positive: TextEmbedding,
    negative: TextEmbedding | None,
    *,
    mesh: SequenceMesh,
    device: torch.device,
    on_step: Callable[[int, Tensor], None],
    recipe: SamplingOptions = SamplingOptions(),
    resume: StepState | None = None,
) -> Tensor:
    """Final latents [C, T, H, W] of one video; see `trajectory`.

    `on_step(n, latents)` is called after each step that is made, n counting those before `resume` too; whatever it
    raises ends the sampling and passes through.
    """
    negatives = None if negative is None else [negative]
    start = resume and StepState(resume.step, resume.latents[None])
    states = trajectory(model, [params], [positive], negatives, mesh=mesh, device=device, recipe=recipe, resume=start)
    for step, latents in enumerate(states, 1 + (resume.step if resume else 0)):
        done = latents[0]
        on_step(step, done)
    return done


def _not_finite(step: int, params: SamplingParams, dtype: torch.dtype) -> str:
    return (
        f"latents are not finite after step {step} of {params.num_inference_steps}: {params.width}x{params.height}, "
        f"{params.num_frames} frames, seed {params.seed}, guidance_scale {params.guidance_scale}, "
        f"cfg_scale {params.cfg_scale}, flow_shift {params.flow_shift}, model dtype {dtype}"
    )
