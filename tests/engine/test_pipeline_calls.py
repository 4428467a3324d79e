"""The arguments of a pipeline call: several videos, latents, callbacks, interrupts."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from hv_batch.engine.pipeline import HunyuanVideoPipeline, Interrupted, choose_device, plan_videos
from hv_batch.engine.sampling import sampler
from hv_batch.engine.sampling.sampler import SamplingOptions
from hv_batch.engine.video_requests import checked_videos
from hv_batch.protocol import NonFiniteError, UserError
from hv_batch.toy.checkpoint import write_toy_checkpoint

FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
PROMPT = "A cat walks on the grass, realistic."
SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3}
LATENTS = {**SMALL, "output": "latents"}
REST = {
    **SMALL,
    "negative_prompt": "",
    "guidance_scale": 6.0,
    "cfg_scale": 1.0,
    "guidance_rescale": 0.0,
    "flow_shift": 7.0,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def pipeline(base):
    return HunyuanVideoPipeline.from_pretrained(base, device="cpu", **FP32)


@pytest.mark.parametrize(
    ("prompts", "seed", "num_videos", "planned"),
    [
        ("a", 7, 2, [("a", 7), ("a", 8)]),
        (["a", "b"], 7, 2, [("a", 7), ("a", 8), ("b", 7), ("b", 8)]),
        (["a", "b"], [7, 20], 2, [("a", 7), ("a", 8), ("b", 20), ("b", 21)]),
        (["a", "b"], [1, 5, 2, 6], 2, [("a", 1), ("a", 5), ("b", 2), ("b", 6)]),
        ("a", [5, 3], 2, [("a", 5), ("a", 3)]),
        ("a", [5], 2, [("a", 5), ("a", 6)]),
    ],
)
def test_seeds_are_assigned_as_in_the_release(prompts, seed, num_videos, planned):
    """Spec section 1: video i of a prompt has seed + i; a list has one seed per prompt or one per video."""
    videos = plan_videos(prompts, seed, num_videos, **REST)
    assert [(params.prompt, params.seed) for params in videos] == planned


@pytest.mark.parametrize(
    ("prompts", "seed", "num_videos", "message"),
    [
        ("a", [1, 2, 3], 2, r"seed is \[1, 2, 3\], allowed is one seed, or a list of 1 or 2: one per prompt"),
        (None, 0, 1, "prompt is None, allowed is a text or a list of texts"),
        (["a", "b"], [], 1, r"seed is \[\]"),
        ("a", "7", 1, "seed is '7'"),
        ("a", [1.5], 1, "seed is 1.5"),
        ("a", True, 1, "seed is True"),
        ("a", 2**63 - 1, 2, f"seed is {2**63}"),
        ("a", 1, 0, "num_videos is 0"),
        (["a", ""], 1, 1, "prompt is ''"),
        (["a", None], 1, 1, "prompt is None"),
    ],
)
def test_wrong_seeds_and_counts_are_reported(prompts, seed, num_videos, message):
    """P6: the error names the given value and the allowed values."""
    with pytest.raises(UserError, match=message):
        plan_videos(prompts, seed, num_videos, **REST)


def test_an_unknown_device_is_refused():
    """P6: the error names the allowed devices."""
    with pytest.raises(UserError, match="device is 'tpu', allowed is 'auto', 'cpu' or 'cuda'"):
        choose_device("tpu")


def test_no_bit_depends_on_the_batch(pipeline):
    """P3: a video has equal bits in a batch of any size, with texts of different lengths and guidance."""
    prompts, choice = ["dark", PROMPT], {**LATENTS, "cfg_scale": 3.0, "guidance_rescale": 0.5, "num_videos": 2}
    together = pipeline(prompts, seed=4, batch_size=4, **choice)
    assert together.shape == (4, 16, 2, 4, 6)
    assert together.dtype == np.float32
    assert np.array_equal(pipeline(prompts, seed=4, batch_size=3, **choice), together)
    alone = pipeline(PROMPT, seed=5, **{**choice, "num_videos": 1})
    assert np.array_equal(together[3], alone)
    assert len({one.tobytes() for one in together}) == 4


def test_frames_and_latents_of_one_video(pipeline):
    """The frames of a call are the decoded latents of the same call; several videos are stacked."""
    latents = pipeline(PROMPT, seed=[1, 2], num_videos=2, **LATENTS)
    frames = pipeline(PROMPT, seed=[1, 2], num_videos=2, **SMALL)
    assert frames.shape == (2, 5, 32, 48, 3)
    assert frames.dtype == np.uint8
    assert np.array_equal(np.concatenate(list(pipeline.decode(latents[1]))), frames[1])
    with pytest.raises(UserError, match="output is 'pixels', allowed is 'frames' or 'latents'"):
        pipeline(PROMPT, **{**SMALL, "output": "pixels"})
    with pytest.raises(UserError, match="batch_size is 0"):
        pipeline(PROMPT, batch_size=0, **SMALL)


def test_the_callback_sees_every_step(pipeline):
    """The callback is called after each step of each batch; the latents of the last step are the result."""
    seen = []
    final = pipeline(PROMPT, num_videos=3, batch_size=2, callback=lambda n, x: seen.append((n, x.clone())), **LATENTS)
    assert [(n, len(x)) for n, x in seen] == [(1, 2), (2, 2), (3, 2), (1, 1), (2, 1), (3, 1)]
    assert np.array_equal(seen[2][1].numpy(), final[:2])
    assert seen[0][1].dtype == torch.float32

    def fail(_step, _latents):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        pipeline(PROMPT, callback=fail, **LATENTS)


def test_an_interrupt_stops_the_current_call_only(pipeline):
    """`interrupt` works from a callback, from another thread and between chunks; it does not affect a later call."""
    expected = pipeline(PROMPT, **LATENTS)
    with pytest.raises(Interrupted, match="after step 1 of 3"):
        pipeline(PROMPT, callback=lambda *_: pipeline.interrupt(), **LATENTS)

    def from_a_thread(_step, _latents):
        thread = threading.Thread(target=pipeline.interrupt)
        thread.start()
        thread.join()

    with pytest.raises(Interrupted):
        pipeline(PROMPT, callback=from_a_thread, **LATENTS)
    chunks = pipeline.decode(expected)
    pipeline.interrupt()
    with pytest.raises(Interrupted, match="while decoding"):
        next(chunks)
    pipeline.interrupt()
    assert np.array_equal(pipeline(PROMPT, **LATENTS), expected)


def test_an_interrupt_after_a_call_does_not_end_the_next_one(pipeline):
    """A late `interrupt` concerns the calls in progress only, also of `denoise`, `decode` and `stream`."""
    (params,) = plan_videos(PROMPT, 1, 1, **REST)
    pipeline.interrupt()
    (latents,) = pipeline.denoise([params])
    pipeline.interrupt()
    assert list(pipeline.decode(latents))
    pipeline.interrupt()
    assert list(pipeline.stream(params))
    finals = pipeline.denoise([params, params])
    next(finals)
    pipeline.interrupt()
    with pytest.raises(Interrupted):
        next(finals)


def test_a_call_during_a_call_raises_a_clear_error(pipeline):
    """A call from the callback or from another thread raises at once, and the first call is not disturbed."""
    expected, errors = pipeline(PROMPT, **LATENTS), []
    (params,) = plan_videos(PROMPT, 0, 1, **REST)

    def call_all():
        for call in (
            lambda: pipeline(PROMPT, **LATENTS),
            lambda: pipeline.stream(params),
            lambda: pipeline.encode([params]),
            lambda: list(pipeline.denoise([params], {PROMPT: None})),
            pipeline.close,
        ):
            with pytest.raises(UserError, match="already rendering, and it renders one call at a time") as error:
                call()
            errors.append(error)

    def from_here_and_from_a_thread(step, latents):
        if step == 1:
            call_all()
            thread = threading.Thread(target=call_all)
            thread.start()
            thread.join()
            assert list(pipeline.decode(latents[0].numpy())), "a preview may be decoded in the callback"

    assert np.array_equal(pipeline(PROMPT, callback=from_here_and_from_a_thread, **LATENTS), expected)
    assert len(errors) == 10
    assert np.array_equal(pipeline(PROMPT, **LATENTS), expected)


def test_two_denoises_may_alternate_between_their_batches(pipeline):
    """Between two batches nothing is computed, so another call may run; a consumer may decode there."""
    videos = plan_videos(PROMPT, 1, 2, **REST)
    finals = pipeline.denoise(videos)
    first = next(finals)
    assert np.array_equal(pipeline(PROMPT, seed=1, **LATENTS), first)
    assert np.array_equal(next(finals), pipeline(PROMPT, seed=2, **LATENTS))


def test_stream_and_denoise_check_what_a_call_checks(pipeline):
    """P6: invalid values are reported before the first step, with embeddings as well."""
    (params,) = plan_videos(PROMPT, 1, 1, **REST)
    texts = pipeline.encode([params])
    for wrong, message in (
        ({"height": 30}, "height is 30"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"seed": -1, "cfg_scale": 0.5}, "seed is -1, .*; cfg_scale is 0.5"),
    ):
        for call in (pipeline.stream, lambda one: pipeline.denoise([one]), lambda one: pipeline.denoise([one], texts)):
            with pytest.raises(UserError, match=message):
                call(replace(params, **wrong))
    with pytest.raises(UserError, match="batch_size is 0"):
        pipeline.denoise([params], batch_size=0)
    with pytest.raises(UserError, match="`embeddings` lacks the text 'another'"):
        pipeline.denoise([replace(params, prompt="another")], texts)
    with pytest.raises(UserError, match="some are images"):
        pipeline.denoise([params, replace(params, num_frames=1)])
    with pytest.raises(UserError, match=r"cfg_scale is 1\.0, allowed is above 1 with cfg_degree 2"):
        checked_videos([params], cfg_degree=2)


def test_numbers_of_numpy_are_accepted(pipeline):
    """Seeds and sizes often come from arrays; the frames are those of the equal Python numbers."""
    expected = pipeline([PROMPT, "dark"], seed=[3, 4], cfg_scale=2.0, negative_prompt="", **LATENTS)
    sizes = {name: np.int64(value) for name, value in SMALL.items()}
    given = {"num_videos": np.int32(1), "batch_size": np.int64(1), "cfg_scale": np.float32(2)}
    given |= {"output": "latents", "negative_prompt": ""}
    assert np.array_equal(pipeline([PROMPT, "dark"], seed=np.array([3, 4]), **sizes, **given), expected)
    assert np.array_equal(pipeline(PROMPT, seed=np.int64(3), **sizes, **given), expected[0])
    params = plan_videos(PROMPT, 3, 1, **{**REST, "cfg_scale": 2.0})[0]
    odd = replace(params, seed=np.uint8(3), height=np.int16(32), cfg_scale=np.float32(2.0))
    assert np.array_equal(next(pipeline.denoise([odd])), expected[0])
    with pytest.raises(UserError, match="seed is True"):
        pipeline(PROMPT, seed=np.bool_(True), **SMALL)
    with pytest.raises(UserError, match=r"num_frames is 5\.0"):
        pipeline(PROMPT, **{**SMALL, "num_frames": np.float64(5)})


def test_an_empty_list_gives_an_empty_list(pipeline):
    """A batch of no prompts is not an error; its other values are still checked."""
    assert pipeline([], **SMALL) == []
    assert pipeline([], seed=[], num_videos=2, **LATENTS) == []
    assert list(pipeline.denoise([])) == []
    assert pipeline.encode([]) == {}
    assert plan_videos([], 0, 1, **REST) == []
    with pytest.raises(UserError, match="height is 31"):
        pipeline([], **{**SMALL, "height": 31})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            "_llama.layers.0.mlp.down_proj.weight",
            "the text states of LLaMA are not finite: float32 of the text encoder",
        ),
        ("_clip.text_model.final_layer_norm.bias", "the pooled vector of CLIP is not finite: float32"),
    ],
)
def test_an_embedding_that_is_not_finite_is_that_of_the_encoder(base, weight, message):
    """P5: a NaN is reported where it arises, not by the DiT, and the pipeline stays usable."""
    pipeline = HunyuanVideoPipeline.from_pretrained(base, device="cpu", **FP32)
    expected = pipeline(PROMPT, **LATENTS)
    owner = pipeline._text_encoder
    for name in weight.split("."):
        owner = getattr(owner, name, owner)  # some versions of transformers have no text_model
    with torch.no_grad():
        owner.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=message):
        pipeline(PROMPT, **LATENTS)
    pipeline.free_text_encoder()
    assert np.array_equal(pipeline(PROMPT, **LATENTS), expected)


def test_latents_that_are_not_finite_are_not_those_of_the_vae(pipeline):
    """P5: a decode names the latents that it was given, before it decodes them."""
    latents = np.zeros((16, 2, 4, 6), np.float32)
    latents[3, 1, 2, 2] = np.nan
    with pytest.raises(NonFiniteError, match="the latents to decode are not finite"):
        list(pipeline.decode(latents))


def test_parts_are_loaded_when_needed(base):
    """Spec section 1, memory: decoding loads neither text encoders nor DiT, and the text encoders can be freed."""
    pipeline = HunyuanVideoPipeline.from_pretrained(base, device="cpu", **FP32)
    assert list(pipeline.decode(np.zeros((16, 1, 4, 6), np.float32)))
    assert not {"_text_encoder", "_denoiser"} & vars(pipeline).keys()
    before = pipeline(PROMPT, **LATENTS)
    pipeline.free_text_encoder()
    assert "_text_encoder" not in vars(pipeline)
    assert np.array_equal(pipeline(PROMPT, **LATENTS), before)


def test_a_prompt_that_is_not_unicode_is_refused(pipeline):
    """P6: undecodable bytes of a command line become lone surrogates in Python, which tokenizers do not accept."""
    with pytest.raises(UserError, match="prompt is not valid Unicode text"):
        pipeline("caf\udce9", **SMALL)


def test_videos_of_a_batch_must_share_their_parameters(pipeline):
    """A batch has one schedule and one shape."""
    one, other = plan_videos("a", 1, 2, **REST)
    with pytest.raises(UserError, match="may differ in prompts and seed only"):
        pipeline.denoise([one, replace(other, flow_shift=5.0)], batch_size=2)


def test_the_official_noise_is_drawn_in_the_dtype_of_the_text(base):
    """Spec section 4: noise "official" is drawn in the dtype of the prompt embedding and then cast to float32."""
    (params,) = plan_videos("a", 1, 1, **REST)
    half = sampler.initial_noise(params, torch.float16)
    assert 0 < (half.float() - sampler.initial_noise(params)).abs().max() < 5e-3
    official = HunyuanVideoPipeline.from_pretrained(
        base, device="cpu", **{**FP32, "text_encoder_precision": "fp16"}, noise="official"
    )
    seen = []
    options = official._denoiser._options
    model = official._denoiser._model
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    official("a", seed=1, **{**LATENTS, "num_inference_steps": 1})
    assert options == SamplingOptions("official", True)
    assert torch.equal(seen[0], half.float())


def test_without_reverse_the_schedule_rises():
    """Spec section 4: without reverse, the levels are 1 - sigma'."""
    levels = sampler.sigmas(5, 7.0, reverse=False)
    assert torch.equal(levels, 1 - sampler.sigmas(5, 7.0))
    assert levels[0] == 0.0


def test_the_two_text_encoders_have_separate_precisions(base):
    """Spec section 1, `--text-encoder-precision-2`: CLIP may have another precision than LLaMA."""
    pipeline = HunyuanVideoPipeline.from_pretrained(
        base, device="cpu", text_encoder_precision="fp32", text_encoder_precision_2="bf16"
    )
    (embedding,) = pipeline._text_encoder.encode(["A cat"], image=True)
    assert (embedding.states.dtype, embedding.pooled.dtype) == (torch.float32, torch.bfloat16)
