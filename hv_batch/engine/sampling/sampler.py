"""The sampling method: flow matching with Euler steps, as plain functions in call order.

    latents = initial_noise(params)                        seeded, on the CPU
    sigma   = sigmas(steps, shift)                         from 1 to 0
    texts   = condition(branch_embeddings(...))            one batch item per video and guidance branch
    repeat:
        velocity = predict_velocity(model, latents, ...)   the DiT, then classifier-free guidance; or the step cache
        latents  = euler_step(latents, velocity, ...)

Latents and velocities are float32, and so is their arithmetic; only the model computes in its own dtype. The method
follows the released HunyuanVideo run.

Shapes: N videos in a batch, B batch items (N, or 2N with classifier-free guidance), C latent channels, T latent frames,
H and W latent rows and columns, L text tokens, D and P widths of the text states and of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hv_batch.attention_methods import ALL_DENSE, DENSE, AttentionMethods, StepAttention
from hv_batch.engine.sampling.cfg_gate import CfgGate
from hv_batch.engine.sampling.step_cache import StepCache
from hv_batch.protocol import NonFiniteError, StepState
from hv_batch.sampling_params import SamplingParams
from hv_batch.step_schedule import StepSchedule, guided_steps

if TYPE_CHECKING:
    from hv_batch.engine.dit.model import HYVideoDiT
    from hv_batch.engine.parallel.sequence import SequenceMesh
    from hv_batch.engine.text_encoders import TextEmbedding

# The model was trained with times from 0 to 1000. It reads both the time and the guidance scale in this unit.
TIME_UNIT = 1000.0

# torch's generator for the CPU (Mersenne Twister) ignores the bits of a seed above bit 31. That for CUDA uses 64 bits.
MAX_TORCH_CPU_SEED = 2**32 - 1


def initial_noise(
    params: SamplingParams, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw standard normal noise [1, C, T, H, W] from the seed of `params`.

    Noise drawn on the CPU is equal on every machine. A CUDA generator draws other values, which also depend on the GPU
    model. The values depend on `dtype`: for one seed, float16 and float32 differ by about 1e-3.
    """
    shape, seed, is_cpu = (1, *params.latent_shape), params.seed, torch.device(device).type == "cpu"
    if is_cpu and seed > MAX_TORCH_CPU_SEED:
        # The legacy generator of NumPy never changes its values for a seed. It uses every word of the seed.
        drawn = np.random.RandomState([seed & MAX_TORCH_CPU_SEED, seed >> 32]).standard_normal(shape)
        return torch.from_numpy(drawn).to(dtype)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def sigmas(steps: int, shift: float, reverse: bool = True) -> Tensor:
    """Return the noise levels before, between and after `steps` steps: float32 [steps + 1], from 1 to 0.

    The released model is sampled in this direction (the official `--flow-reverse`). Without `reverse` the levels rise
    from 0 to 1, for which the model was not trained. A `shift` above 1 uses more of the steps at high noise, which
    determines the layout of a large picture.
    """
    even = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32)
    shifted = shift * even / (1.0 + (shift - 1.0) * even)
    return shifted if reverse else 1.0 - shifted


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Sampling options of the engine. They are part of the identity of every video (P3)."""

    noise: str = "cpu-fp32"  # one of NOISES
    reverse: bool = True
    step_cache: StepSchedule | None = None  # None computes every step
    cfg_until: float | None = None  # share of the steps that run the negative branch of CFG; None: all
    attention: AttentionMethods = ALL_DENSE


# "official" draws as the release does: on the model's device, in the dtype of the prompt embedding.
NOISES = ("cpu-fp32", "official")


@dataclass(frozen=True, slots=True)
class Condition:
    """The model's inputs besides latents and time. Each video has one batch item per guidance branch."""

    states: Tensor  # [B, L, D], right padded with zeros
    lengths: tuple[int, ...]  # valid text tokens of each item
    pooled: Tensor  # [B, P]
    guidance: Tensor | None  # [B], scale * 1000; None if the model has no guidance embedding

    def of_last(self, items: int) -> Condition:
        """Return the inputs of the last `items` batch items: with CFG on one rank, those of the positive branch."""
        return Condition(
            self.states[-items:],
            self.lengths[-items:],
            self.pooled[-items:],
            None if self.guidance is None else self.guidance[-items:],
        )


def branch_embeddings(
    params: SamplingParams,
    positives: Sequence[TextEmbedding],
    negatives: Sequence[TextEmbedding] | None,
    mesh: SequenceMesh,
) -> Sequence[TextEmbedding]:
    """Return the embeddings that this rank computes.

    These are the embeddings of all guidance branches, negative branch first, or of one branch if cfg_degree is 2.
    Raises ValueError if CFG is used without negative embeddings, or if cfg_degree is 2 and CFG is not used.
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
    """Batch the embeddings of all guidance branches on `device`, padded to the longest.

    The guidance scale is cast to the model's dtype before it is multiplied, as in the released run: in bfloat16, 6.0
    becomes 6016. A product that this dtype cannot hold (float16, scales above 65.5) is not rounded. The text
    states keep the encoder's dtype, because the model averages them before it rounds them.
    """
    guidance = None
    if model.config.guidance_embed:
        scale = torch.full((len(branches),), guidance_scale, dtype=model.dtype, device=device)
        product = scale * TIME_UNIT
        guidance = torch.where(product.isfinite(), product.float(), scale.float() * TIME_UNIT)
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
    gate: CfgGate | None = None,
    attention: StepAttention = DENSE,
) -> Tensor:
    """Return the guided velocity at noise level `sigma` for latents [N, C, T, H, W]: same shape, float32.

    `texts` holds the branches that this rank computes; see `branch_embeddings`. With CFG and a `gate`, these may be the
    positive branches alone. `attention` are the methods of this step.
    """
    items = len(texts.lengths)
    inputs = latents.repeat(items // len(latents), 1, 1, 1, 1)
    time = (sigma * TIME_UNIT).to(latents.device).expand(items)
    own = model(inputs, time, texts.states, texts.lengths, texts.pooled, texts.guidance, mesh, attention)
    velocity = mesh.all_gather_branches(own).float()
    if len(velocity) > len(latents):
        negative, positive = gate.split(velocity) if gate else velocity.chunk(2)
    elif gate:
        negative, positive = gate.complete(velocity)
    else:
        return velocity
    return guide(negative, positive, params.cfg_scale, params.guidance_rescale)


def guide(negative: Tensor, positive: Tensor, scale: float, rescale: float) -> Tensor:
    """Apply classifier-free guidance with the rescale of Lin et al. (arXiv 2305.08891, section 3.4).

    `rescale` is the weight of a copy that has the standard deviation of the positive branch. It reduces the
    over-exposure that a large `scale` causes.
    """
    guided = negative + scale * (positive - negative)
    if rescale == 0.0:
        return guided
    dims = tuple(range(1, guided.ndim))
    restored = guided * (positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return rescale * restored + (1.0 - rescale) * guided


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Integrate `velocity` from noise level `sigma` to `sigma_next`, in float32."""
    return latents + velocity * float(sigma_next - sigma)


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """The result of one step of a batch."""

    latents: Tensor  # [N, C, T, H, W], float32
    computed: int  # number of steps so far that ran the model, including those before a resume
    state: Mapping[str, Tensor]  # what later steps need besides the latents, by name; float32, shaped like the latents


@torch.no_grad()
def finished_steps(
    model: HYVideoDiT,
    batch: Sequence[SamplingParams],
    positives: Sequence[TextEmbedding],
    negatives: Sequence[TextEmbedding] | None,
    *,
    mesh: SequenceMesh,
    device: torch.device,
    options: SamplingOptions = SamplingOptions(),
    resume: StepState | None = None,
) -> Generator[FinishedStep, None, None]:
    """Yield the result of each step of N videos. Tensors are on `device` and equal on every rank of `mesh`.

    The videos may differ only in prompts and seed. The bits of a video do not depend on the batch. `negatives` are
    required if the parameters use CFG, and ignored otherwise. `resume` is the state of an earlier call with the same
    arguments, with arrays [N, C, T, H, W]: only the later steps are computed, and they have the same bits. Each step
    allocates new tensors and does not modify those yielded before. Closing the generator stops the sampling.

    Raises ValueError if the videos differ in other fields, if `resume` does not fit them, and in the cases of
    `branch_embeddings`. Raises NonFiniteError after a step whose result is not finite.
    """
    params = batch[0]
    if any(
        replace(other, prompt="", negative_prompt="", seed=0) != replace(params, prompt="", negative_prompt="", seed=0)
        for other in batch
    ):
        raise ValueError("videos of one batch may differ in prompts and seed only")
    texts = condition(model, branch_embeddings(params, positives, negatives, mesh), params.guidance_scale, device)
    steps = params.num_inference_steps
    levels = sigmas(steps, params.flow_shift, options.reverse)
    cache, gate = _empty_state(params, options, levels)
    first = resume.step if resume else 0
    if resume is None:
        latents = _start(batch, positives[0].states.dtype, device, mesh, options)
    else:
        if problem := resume_problem(batch, resume, options):
            raise ValueError(problem)
        latents = _resumed(resume, device, cache, gate)
    for step in range(first, steps):
        if cache is None or cache.is_computed(step):
            own = texts if gate is None or gate.is_open(step) else texts.of_last(len(batch))
            attention = options.attention.at(step, steps)
            velocity = predict_velocity(model, latents, levels[step], own, params, mesh, gate, attention)
            latents = cache.correct(step, latents, velocity) if cache else latents
        else:
            velocity = cache.predict(step)
        latents = euler_step(latents, velocity, levels[step], levels[step + 1])
        # This check waits for the device. The wait is short compared with a step, saves the remaining steps of a failed
        # sample, and ensures that a reported step is finished, not queued. All ranks hold equal latents, so all raise.
        if not torch.isfinite(latents).all():
            failed = next(one for one, item in zip(batch, latents, strict=True) if not torch.isfinite(item).all())
            raise NonFiniteError(_not_finite(step + 1, failed, model.dtype))
        state = {**(cache.state() if cache else {}), **(gate.state() if gate else {})}
        yield FinishedStep(latents, cache.count(step + 1) if cache else step + 1, state)


def trajectory(
    model: HYVideoDiT,
    batch: Sequence[SamplingParams],
    positives: Sequence[TextEmbedding],
    negatives: Sequence[TextEmbedding] | None,
    *,
    mesh: SequenceMesh,
    device: torch.device,
    options: SamplingOptions = SamplingOptions(),
) -> Generator[Tensor, None, None]:
    """Yield the latents [N, C, T, H, W] of N videos after each step; see `finished_steps`."""
    for step in finished_steps(model, batch, positives, negatives, mesh=mesh, device=device, options=options):
        yield step.latents


def _empty_state(
    params: SamplingParams, options: SamplingOptions, levels: Tensor
) -> tuple[StepCache | None, CfgGate | None]:
    """Return the step cache and the CFG gate of a denoise, empty; None if it does not use them."""
    steps = params.num_inference_steps
    cache = StepCache(options.step_cache, levels) if options.step_cache else None
    gate = CfgGate(guided_steps(options.cfg_until, steps)) if options.cfg_until and params.uses_cfg else None
    return cache, gate


def _start(
    batch: Sequence[SamplingParams],
    text_dtype: torch.dtype,
    device: torch.device,
    mesh: SequenceMesh,
    options: SamplingOptions,
) -> Tensor:
    """Return the initial latents of a batch, float32 on `device`."""
    if options.noise == "cpu-fp32":
        return torch.cat([initial_noise(params) for params in batch]).to(device)
    # Each video has its own generator, so its noise does not depend on the batch. Different GPU models draw different
    # noise, so all ranks use that of rank 0.
    drawn = torch.cat([initial_noise(params, text_dtype, device) for params in batch])
    return mesh.broadcast_from_rank0(drawn).float()


def resume_problem(batch: Sequence[SamplingParams], state: StepState, options: SamplingOptions) -> str | None:
    """Return why a denoise of these videos cannot continue from `state`, or None if it can.

    `state` has arrays [N, C, T, H, W]. One that was read from storage may lack arrays, or have others.
    """
    params, step = batch[0], state.step
    steps, shape = params.num_inference_steps, (len(batch), *params.latent_shape)
    cache, gate = _empty_state(params, options, sigmas(steps, params.flow_shift, options.reverse))
    names = (cache.names(step) if cache else set()) | (gate.names() if gate else set())
    what = f"cannot resume after step {step} of {steps}"
    if not 0 < step < steps:
        return what
    if state.history.keys() != names:
        return f"{what} with the arrays {sorted(state.history)}; expected {sorted(names)}"
    if others := {array.shape for array in (state.latents, *state.history.values())} - {shape}:
        return f"{what} with arrays of shape {others.pop()}; expected {shape}"
    return None


def _resumed(state: StepState, device: torch.device, cache: StepCache | None, gate: CfgGate | None) -> Tensor:
    """Return the latents of `state`, float32 on `device`. Restore `cache` and `gate` from its other arrays.

    All arrays are copied into memory with the alignment and layout of torch.
    """
    history = {name: torch.tensor(array, dtype=torch.float32, device=device) for name, array in state.history.items()}
    if cache:
        cache.restore(history, state.step)
    if gate:
        gate.restore(history)
    return torch.tensor(state.latents, dtype=torch.float32, device=device)


def denoise(
    model: HYVideoDiT,
    params: SamplingParams,
    positive: TextEmbedding,
    negative: TextEmbedding | None,
    *,
    mesh: SequenceMesh,
    device: torch.device,
    on_step: Callable[[int, FinishedStep], None],
    options: SamplingOptions = SamplingOptions(),
    resume: StepState | None = None,
) -> Tensor:
    """Return the final latents [C, T, H, W] of one video; see `finished_steps`.

    `on_step(n, result)` is called after each step; n includes the steps before `resume`, and the tensors of the result
    have no axis N. An exception of `on_step` stops the sampling and propagates.
    """
    negatives = None if negative is None else [negative]
    start = resume and as_batch(resume)
    results = finished_steps(
        model, [params], [positive], negatives, mesh=mesh, device=device, options=options, resume=start
    )
    for step, result in enumerate(results, 1 + (resume.step if resume else 0)):
        latents = result.latents[0]
        on_step(step, replace(result, latents=latents, state={name: each[0] for name, each in result.state.items()}))
    return latents


def as_batch(state: StepState) -> StepState:
    """Return the state of one video as that of a batch of one."""
    return StepState(state.step, state.latents[None], {name: array[None] for name, array in state.history.items()})


def _not_finite(step: int, params: SamplingParams, dtype: torch.dtype) -> str:
    return (
        f"latents are not finite after step {step} of {params.num_inference_steps}: {params.width}x{params.height}, "
        f"{params.num_frames} frames, seed {params.seed}, guidance_scale {params.guidance_scale}, "
        f"cfg_scale {params.cfg_scale}, flow_shift {params.flow_shift}, model dtype {dtype}"
    )
