"""The sampler against diffusers' scheduler and pipeline, and the contract of its functions."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.sampling import sampler
from hv_batch.engine.text_encoders import TextEmbedding
from hv_batch.protocol import StepState
from tests.support.dit_reference import SMALL_VIDEO

CPU = torch.device("cpu")
PARAMS = replace(SMALL_VIDEO, negative_prompt="b", num_inference_steps=4, seed=7)


WIDE_SEED_NOISE = [-0.6358715, -1.2343866, 1.7795178]  # the first values of seed 2**32 + 7


class Field:
    """A velocity field with the DiT's signature. It depends on every input, and does not depend on padding."""

    def __init__(self, guidance_embed=True, dtype=torch.float32):
        self.config = SimpleNamespace(guidance_embed=guidance_embed)
        self.dtype = dtype
        self.calls = []

    def __call__(self, latents, timestep, text_states, text_lengths, pooled, guidance, mesh, attention=None):
        self.calls.append(
            SimpleNamespace(
                latents=latents, timestep=timestep, states=text_states, lengths=text_lengths, guidance=guidance
            )
        )
        text = torch.stack([states[:n].mean() for states, n in zip(text_states, text_lengths, strict=True)])
        strength = text + pooled.mean(1) + timestep / 1000 + (0 if guidance is None else guidance / 6000)
        velocity = torch.sin(2 * latents) * strength.view(-1, 1, 1, 1, 1) + 0.1 * latents.roll(1, -1)
        return velocity.to(self.dtype)


def embed(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    states, pooled = torch.randn(tokens, 8, generator=generator), torch.randn(6, generator=generator)
    return TextEmbedding(states, pooled, num_tokens=tokens, tokens_lost=0)


def run(params=PARAMS, model=None, on_step=lambda n, latents: None, resume=None):
    negative = embed(3, 2) if params.uses_cfg else None
    return sampler.denoise(
        model or Field(),
        params,
        embed(5, 1),
        negative,
        mesh=SequenceMesh.single(),
        device=CPU,
        on_step=on_step,
        resume=resume,
    )


@pytest.mark.parametrize(("steps", "shift"), [(1, 7.0), (7, 1.0), (50, 7.0), (50, 17.0), (1000, 0.5)])
def test_the_schedule_is_that_of_the_reference(steps, shift):
    """Spec section 4: shifted sigmas from 1 to 0; the model's timestep is sigma * 1000."""
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    torch.testing.assert_close(sampler.sigmas(steps, shift), reference.sigmas, rtol=0, atol=1e-6)
    timesteps = sampler.sigmas(steps, shift)[:-1] * sampler.TIME_UNIT
    torch.testing.assert_close(timesteps, reference.timesteps, rtol=0, atol=1e-3)


@given(steps=st.integers(1, 1000), shift=st.floats(0.01, 1000.0))
@settings(max_examples=50, deadline=None)
def test_the_schedule_falls_from_one_to_zero(steps, shift):
    """Spec section 4: with any shift, the noise level starts at 1, never rises and ends at exactly 0."""
    levels = sampler.sigmas(steps, shift)
    assert levels.dtype == torch.float32
    assert levels.shape == (steps + 1,)
    assert levels[0].item() == pytest.approx(1.0, abs=1e-6)
    assert levels[-1].item() == 0.0
    assert (levels.diff() <= 0).all()


def test_noise_is_a_function_of_the_seed_and_the_shape():
    """P3: noise depends neither on the global generator nor on the prompt nor on earlier draws."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    noise = sampler.initial_noise(PARAMS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(noise, sampler.initial_noise(replace(PARAMS, prompt="other", num_inference_steps=9)))
    assert not torch.equal(noise, sampler.initial_noise(replace(PARAMS, seed=8)))
    assert noise.shape == (1, *PARAMS.latent_shape)
    assert noise.dtype == torch.float32
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)


def test_noise_takes_the_largest_seed():
    """Spec section 1: every seed that a manifest allows can be used."""
    assert sampler.initial_noise(replace(PARAMS, seed=2**63 - 1)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_seeds_that_differ_above_bit_31_give_different_noise(dtype):
    """Seeds such as `row << 32 | i` give different, uncorrelated noise, whose values never change."""
    seeds = [7, 1 << 32, 1 << 32 | 7, 2 << 32 | 7, 7 << 32 | 1, 2**63 - 1]
    drawn = [sampler.initial_noise(replace(PARAMS, seed=seed), dtype) for seed in seeds]
    assert {noise.dtype for noise in drawn} == {dtype}
    assert {noise.shape for noise in drawn} == {(1, *PARAMS.latent_shape)}
    correlation = torch.corrcoef(torch.stack([noise.flatten().float() for noise in drawn]))
    assert (correlation - torch.eye(len(seeds))).abs().max() < 0.15
    assert all(noise.float().std().item() == pytest.approx(1.0, abs=0.1) for noise in drawn)
    assert drawn[2].flatten()[:3].tolist() == pytest.approx(WIDE_SEED_NOISE, abs=1e-3)


def test_seeds_below_2_to_32_keep_their_noise():
    """Revision 1 drew the same noise for them."""
    for seed in (0, 7, 2**31, 2**32 - 1):
        drawn = torch.randn((1, *PARAMS.latent_shape), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(sampler.initial_noise(replace(PARAMS, seed=seed)), drawn)


class DiffusersField(torch.nn.Module):
    """`Field` with the signature of diffusers' transformer."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(in_channels=16)
        self.dtype, self.device = torch.float32, CPU

    def cache_context(self, _name):
        return nullcontext()

    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        encoder_attention_mask,
        pooled_projections,
        guidance,
        attention_kwargs,
        return_dict,
    ):
        lengths = [int(n) for n in encoder_attention_mask.sum(1)]
        return (
            Field()(hidden_states, timestep, encoder_hidden_states, lengths, pooled_projections, guidance, mesh=None),
        )


@pytest.mark.parametrize("cfg_scale", [1.0, 4.5])
def test_a_trajectory_is_that_of_the_reference_pipeline(cfg_scale):
    """Spec section 4, end to end: diffusers' pipeline with the same velocity field, noise and texts gives the same
    latents, with and without classifier-free guidance (with two texts of different lengths)."""
    params = replace(PARAMS, cfg_scale=cfg_scale, num_inference_steps=6)
    pipeline = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=DiffusersField(),
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=params.flow_shift),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    positive, negative = embed(5, 1), embed(3, 2)
    texts = {
        "prompt_embeds": positive.states[None],
        "prompt_attention_mask": torch.ones(1, 5),
        "pooled_prompt_embeds": positive.pooled[None],
        "negative_prompt_embeds": negative.states[None],
        "negative_prompt_attention_mask": torch.ones(1, 3),
        "negative_pooled_prompt_embeds": negative.pooled[None],
    }
    expected = pipeline(
        **texts,
        true_cfg_scale=cfg_scale,
        height=params.height,
        width=params.width,
        num_frames=params.num_frames,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        latents=sampler.initial_noise(params),
        output_type="latent",
    ).frames
    torch.testing.assert_close(run(params), expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_guidance_is_rescaled_as_in_the_paper(rescale):
    """Guidance rescale (Lin et al. 2305.08891, section 3.4) equals diffusers' implementation."""
    negative, positive = torch.randn(2, 1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    guided = negative + 5.0 * (positive - negative)
    expected = rescale_noise_cfg(guided, positive, guidance_rescale=rescale)
    torch.testing.assert_close(sampler.guide(negative, positive, 5.0, rescale), expected)
    if rescale == 1.0:
        assert expected.std().item() == pytest.approx(positive.std().item(), rel=1e-5)


def test_rescale_reaches_the_latents():
    """Spec section 1: `guidance_rescale` changes a video with guidance, and does not change one without."""
    guided = replace(PARAMS, cfg_scale=4.0)
    assert not torch.equal(run(guided), run(replace(guided, guidance_rescale=0.7)))
    assert torch.equal(run(PARAMS), run(replace(PARAMS, guidance_rescale=0.7)))


def test_guidance_runs_one_batch_with_the_negative_prompt_first():
    """Spec section 1: classifier-free guidance doubles the batch: negative branch first, padded to one length."""
    model = Field()
    run(replace(PARAMS, cfg_scale=3.0, num_inference_steps=1), model)
    (call,) = model.calls
    assert call.latents.shape[0] == 2
    assert torch.equal(call.states[0, :3], embed(3, 2).states)
    assert torch.equal(call.states[1], embed(5, 1).states)
    assert not call.states[0, 3:].any()
    assert call.lengths == (3, 5)


@pytest.mark.parametrize(("scale", "seen"), [(6.0, 6016.0), (6.3, 6304.0)])
def test_guidance_is_rounded_as_in_the_released_run(scale, seen):
    """Spec section 4: guidance is cast to the model's dtype first. In bfloat16 6.3 is 6.3125; times 1000 it is 6304."""
    model = Field(dtype=torch.bfloat16)
    assert sampler.condition(model, [embed(2, 1)], scale, CPU).guidance.tolist() == [seen]


def test_float16_takes_every_allowed_guidance_scale():
    """Up to 65.5 the product is rounded to float16 as in revision 1; above, where float16 overflows, it is not."""

    def guidance(scale: float) -> float:
        return sampler.condition(Field(dtype=torch.float16), [embed(2, 1)], scale, CPU).guidance.item()

    for scale in (0.0, 1.0, 6.0, 6.3, 33.3, 65.5):
        assert guidance(scale) == (torch.tensor(scale, dtype=torch.float16) * 1000).item()
    assert [guidance(scale) for scale in (65.625, 80.0, 100.0)] == [65_625.0, 80_000.0, 100_000.0]


def test_only_the_model_computes_in_its_dtype():
    """Spec section 4: the update is float32, and latents and times are passed to the model unrounded."""
    model = Field(dtype=torch.bfloat16)
    latents = run(model=model)
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, latents.bfloat16().float())
    assert {call.latents.dtype for call in model.calls} == {torch.float32}
    assert {call.timestep.dtype for call in model.calls} == {torch.float32}


def test_a_model_without_guidance_embedding_gets_no_guidance():
    """Spec section 2: the guidance embedder is an option of the config."""
    model = Field(guidance_embed=False)
    run(model=model)
    assert {call.guidance for call in model.calls} == {None}


def test_steps_are_reported_in_order_and_an_exception_stops_the_sampling():
    """Protocol `Denoiser.denoise`: on_step is called after each step; its exception propagates and stops the group."""
    seen = []
    final = run(on_step=lambda step, result: seen.append((step, result.latents)))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[-1][1], final)

    class StopError(Exception):
        pass

    def stop_at_two(step, _latents):
        if step == 2:
            raise StopError

    model = Field()
    with pytest.raises(StopError):
        run(model=model, on_step=stop_at_two)
    assert len(model.calls) == 2


def test_a_result_that_is_not_finite_is_refused_at_its_step():
    """P5: a sample that overflows fails at its step with a reason, and does not become a black video."""

    class Overflow(Field):
        def __call__(self, *inputs):
            velocity = super().__call__(*inputs)
            if len(self.calls) == 3:
                velocity[..., 0, 0] = float("inf")
            return velocity

    seen = []
    with pytest.raises(ValueError, match=r"not finite after step 3 of 4.*48x32.*seed 7"):
        run(model=Overflow(), on_step=lambda step, _latents: seen.append(step))
    assert seen == [1, 2]


def test_cfg_degree_2_needs_guidance():
    """P6: cfg_degree 2 needs two guidance branches; each half of the group computes the texts of one branch."""
    positives, negatives = [embed(5, 1), embed(4, 3)], [embed(3, 2), embed(2, 4)]
    halves = [SequenceMesh(rank=0, ulysses_degree=1, ring_degree=1, cfg_degree=2, branch=branch) for branch in range(2)]
    guided = replace(PARAMS, cfg_scale=2.0)
    own = [sampler.branch_embeddings(guided, positives, negatives, half) for half in halves]
    assert own == [negatives, positives]
    with pytest.raises(ValueError, match=r"cfg_degree 2 needs a cfg_scale above 1, not 1\.0"):
        sampler.branch_embeddings(PARAMS, positives, None, halves[0])


def test_guidance_without_a_negative_embedding_is_refused():
    """Protocol `Denoiser.denoise`: a sample with guidance is never rendered without it."""
    with pytest.raises(ValueError, match="negative prompt"):
        sampler.denoise(
            Field(),
            replace(PARAMS, cfg_scale=2.0),
            embed(5, 1),
            None,
            mesh=SequenceMesh.single(),
            device=CPU,
            on_step=lambda n, latents: None,
        )


@given(
    steps=st.integers(2, 9),
    at=st.integers(1, 8),
    cfg_scale=st.sampled_from([1.0, 3.0]),
    rescale=st.sampled_from([0.0, 0.7]),
    shift=st.sampled_from([1.0, 7.0]),
)
@settings(max_examples=40, deadline=None)
def test_a_resumed_trajectory_is_the_same_bits(steps, at, cfg_scale, rescale, shift):
    """P3, P4: a resume from any step, with and without CFG, computes only later steps and gives equal latents."""
    params = replace(PARAMS, num_inference_steps=steps, cfg_scale=cfg_scale, guidance_rescale=rescale, flow_shift=shift)
    at = min(at, steps - 1)
    states = {}
    final = run(params, on_step=lambda step, result: states.setdefault(step, result.latents.numpy()))
    kept = states[at].copy()
    model, seen = Field(), []
    again = run(params, model, lambda step, latents: seen.append(step), StepState(at, states[at]))
    assert torch.equal(again, final)
    assert seen == list(range(at + 1, steps + 1))
    assert len(model.calls) == steps - at
    assert np.array_equal(states[at], kept), "the given state must not be modified"


def test_latents_from_an_object_store_are_resumed_from():
    """P4: arrays from Ray's object store are read-only and can be resumed from."""
    states = {}
    final = run(on_step=lambda step, result: states.setdefault(step, result.latents.numpy()))
    states[2].flags.writeable = False
    assert torch.equal(run(resume=StepState(2, states[2])), final)


@pytest.mark.parametrize(("step", "shape"), [(0, (16, 2, 4, 6)), (4, (16, 2, 4, 6)), (2, (16, 2, 4, 4))])
def test_a_state_that_cannot_be_of_this_video_is_refused(step, shape):
    """P3: a state with an impossible step or with latents of another size raises ValueError."""
    with pytest.raises(ValueError, match=f"cannot resume after step {step} of 4"):
        run(resume=StepState(step, np.zeros(shape, np.float32)))
