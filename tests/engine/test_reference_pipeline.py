"""The path from a prompt to final latents, against diffusers' HunyuanVideoPipeline with the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import HunyuanVideoPipeline as ReferencePipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.engine.sampling.sampler import initial_noise
from hv_batch.engine.text_encoders import IMAGE_TEMPLATE, VIDEO_TEMPLATE
from hv_batch.sampling_params import SamplingParams
from hv_batch.toy.checkpoint import write_toy_checkpoint
from tests.support.dit_reference import reference_model

FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
PROMPTS = ["A cat walks on the grass, realistic.", "a cat and a dog walk along the beach, " * 60, "é 中文 {} 1234567"]
SIZE = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 10}


class RescalingScheduler(FlowMatchEulerDiscreteScheduler):
    """Adds guidance rescale to diffusers' pipeline, which lacks it for this model.

    It applies diffusers' own function between the guidance and the step, as the other pipelines of diffusers do.
    """

    rescale = 0.0
    positive: torch.Tensor | None = None

    def step(self, velocity, *arguments, **choices):
        if self.rescale:
            velocity = rescale_noise_cfg(velocity, self.positive, guidance_rescale=self.rescale)
        return super().step(velocity, *arguments, **choices)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def ours(base):
    return HunyuanVideoPipeline.from_pretrained(base, device="cpu", **FP32)


@pytest.fixture(scope="module")
def reference(base, ours):
    transformer = reference_model(ours._denoiser._model)
    pipeline = ReferencePipeline(
        text_encoder=LlamaModel.from_pretrained(base / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(base / "text_encoder"),
        transformer=transformer,
        vae=None,
        scheduler=RescalingScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel.from_pretrained(base / "text_encoder_2", dtype=torch.float32),
        tokenizer_2=AutoTokenizer.from_pretrained(base / "text_encoder_2"),
    )
    pipeline.set_progress_bar_config(disable=True)

    def remember(scheduler, _module, _inputs, output):
        # In each step, the call with the prompt comes first, then the call with the negative prompt.
        scheduler.positive = output[0] if scheduler.is_first else scheduler.positive
        scheduler.is_first = not scheduler.is_first

    transformer.register_forward_hook(partial(remember, pipeline.scheduler))
    return pipeline


def test_the_video_template_is_the_reference_one():
    """Spec 3.1: the template equals diffusers' byte for byte and is cropped at the same token."""
    assert VIDEO_TEMPLATE.head + "{}" + VIDEO_TEMPLATE.tail == DEFAULT_PROMPT_TEMPLATE["template"]
    assert VIDEO_TEMPLATE.crop_start == DEFAULT_PROMPT_TEMPLATE["crop_start"]


@pytest.mark.parametrize("template", [VIDEO_TEMPLATE, IMAGE_TEMPLATE])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_encoded_as_by_the_reference(ours, reference, template, prompt):
    """Spec section 3: equal states, valid lengths and pooled vectors, for short, truncated and unusual prompts."""
    length = 315 if template is IMAGE_TEMPLATE else 256
    embedding = ours._text_encoder.encode([prompt], image=template is IMAGE_TEMPLATE)[0]
    with torch.no_grad():
        states, pooled, mask = reference.encode_prompt(
            prompt.strip(),
            prompt_template={
                "template": template.head + "{}" + template.tail,
                "crop_start": template.crop_start,
            },
            max_sequence_length=length,
        )
    assert states.shape[1] == length
    valid = mask[0].bool()
    assert len(embedding.states) == int(valid.sum())
    torch.testing.assert_close(embedding.states, states[0, valid], rtol=0, atol=1e-6)
    torch.testing.assert_close(embedding.pooled, pooled[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("cfg_scale", "rescale"), [(1.0, 0.0), (4.5, 0.0), (4.5, 0.7)])
def test_ten_steps_are_those_of_the_reference_pipeline(ours, reference, cfg_scale, rescale):
    """Spec section 4, from prompt to latents: without guidance, with it, and with rescale (arXiv 2305.08891)."""
    params = SamplingParams(
        prompt=PROMPTS[0],
        negative_prompt="dark, blurred",
        seed=3,
        guidance_scale=6.0,
        cfg_scale=cfg_scale,
        guidance_rescale=rescale,
        flow_shift=7.0,
        **SIZE,
    )
    reference.scheduler.rescale, reference.scheduler.is_first = rescale, True
    expected = reference(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        true_cfg_scale=cfg_scale,
        guidance_scale=params.guidance_scale,
        latents=initial_noise(params),
        output_type="latent",
        **SIZE,
    ).frames[0]
    (latents,) = ours.denoise([params])
    assert expected.abs().max() > 2  # not trivially near zero
    torch.testing.assert_close(torch.from_numpy(latents), expected, rtol=0, atol=1e-4)
