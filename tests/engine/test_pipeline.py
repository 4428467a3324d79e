"""The engine object and the single-process pipeline on the toy checkpoint, from prompts to frames."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import multiprocessing

from hv_batch.engine.checkpoint.loading import load_dit, load_vae
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.parallel.process_group import leave_group
from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.engine.sampling.sampler import initial_noise
from hv_batch.protocol import DeviceError, NonFiniteError, ParallelPlan, RankSpec, UserError
from hv_batch.sampling_params import SamplingParams
from hv_batch.toy.checkpoint import TOY_DIT, TOY_VAE, write_toy_checkpoint

FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
OPTIONS = {**FP32, "dit": TOY_DIT}
PROMPT = "A cat walks on the grass, realistic."
SMALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3}
PARAMS = SamplingParams(
    prompt=PROMPT,
    negative_prompt="dark",
    seed=0,
    guidance_scale=6.0,
    cfg_scale=1.0,
    guidance_rescale=0.0,
    flow_shift=7.0,
    **SMALL,
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def pipeline(toy):
    return HunyuanVideoPipeline.from_pretrained(toy, device="cpu", **OPTIONS)


def rank_spec(rank, world_size, address):
    return RankSpec(
        rank=rank,
        local_rank=rank,
        plan=ParallelPlan(ulysses_degree=world_size, ring_degree=1),
        device="cpu",
        address=address,
        timeout_s=60.0,
    )


def test_a_prompt_becomes_frames(pipeline):
    """Design section 1: the pipeline runs the whole path, and the frames of a video differ."""
    steps = []
    frames = pipeline(PROMPT, **SMALL, callback=lambda step, latents: steps.append((step, latents.shape)))
    assert frames.shape == (9, 32, 48, 3)
    assert frames.dtype == np.uint8
    assert steps == [(step, (1, *PARAMS.latent_shape)) for step in (1, 2, 3)]
    assert frames.std() > 5
    assert not np.array_equal(frames[0], frames[-1])


def test_one_frame_is_an_image(pipeline):
    """Spec sections 1 and 3.1: one frame is an image, and its prompt uses the image template."""
    params = replace(PARAMS, num_frames=1)
    image = np.concatenate(list(pipeline.stream(params)))
    assert image.shape == (1, 32, 48, 3)
    rendered = []
    for template in (True, False):
        (text,) = pipeline._text_encoder.encode([PROMPT], image=template)
        latents = pipeline._denoiser.denoise(params, text, None, lambda n, read: None)
        rendered.append(np.concatenate(list(pipeline._decoder.decode(latents))))
    assert np.array_equal(image, rendered[0])
    assert not np.array_equal(image, rendered[1])


def test_equal_parameters_give_equal_bytes(toy, pipeline):
    """P3: equal bytes in the same process after other renders, and from a newly loaded model."""
    first = pipeline(PROMPT, **SMALL, cfg_scale=2.0)
    pipeline("Something else", **{**SMALL, "height": 64})
    assert np.array_equal(pipeline(PROMPT, **SMALL, cfg_scale=2.0), first)
    fresh = HunyuanVideoPipeline.from_pretrained(toy, device="cpu", **OPTIONS)
    assert np.array_equal(fresh(PROMPT, **SMALL, cfg_scale=2.0), first)


def test_every_parameter_reaches_the_pixels(pipeline):
    """P3: each parameter of a video's identity changes its pixels."""
    guided = {"cfg_scale": 3.0, "guidance_rescale": 0.5, "negative_prompt": "dark"}
    frames = pipeline(PROMPT, **SMALL, **guided)
    for change in (
        {"seed": 1},
        {"guidance_scale": 1.0},
        {"flow_shift": 3.0},
        {"num_inference_steps": 2},
        {"cfg_scale": 2.0},
        {"guidance_rescale": 0.0},
        {"negative_prompt": "A field of red flowers under a bright sun"},
    ):
        assert not np.array_equal(pipeline(PROMPT, **{**SMALL, **guided, **change}), frames), change
    assert not np.array_equal(pipeline("A red car on a bridge at night", **SMALL, **guided), frames)


def test_the_negative_prompt_matters_only_with_guidance(pipeline):
    """Spec section 1: the negative prompt is used only if cfg_scale > 1."""
    assert np.array_equal(pipeline(PROMPT, **SMALL), pipeline(PROMPT, **SMALL, negative_prompt="dark"))


def test_chunks_are_the_frames(toy, pipeline):
    """Protocol `Decoder.decode`: one chunk per temporal tile, in order; together they are the video."""
    tiled = HunyuanVideoPipeline.from_pretrained(
        toy, device="cpu", **OPTIONS, vae_tile={"spatial_px": 32, "temporal_frames": 16}
    )
    params = replace(PARAMS, num_frames=25)
    chunks = list(tiled.stream(params))
    assert len(chunks) > 1
    assert np.array_equal(np.concatenate(chunks), tiled(PROMPT, **{**SMALL, "num_frames": 25}, negative_prompt="dark"))
    whole = np.concatenate(list(pipeline.stream(params)))
    assert whole.shape == (25, 32, 48, 3)
    assert not np.array_equal(np.concatenate(chunks), whole)  # P3: tile geometry belongs to the identity


def test_all_bad_values_are_reported_at_once(pipeline):
    """P6: the Python API applies the same rules as a manifest row, and one error names all invalid values."""
    with pytest.raises(UserError) as error:
        pipeline(" ", height=100, width=48, num_frames=8, seed=-1)
    for message in ("prompt", "height is 100, allowed is a multiple of 16", "num_frames is 8", "seed is -1"):
        assert message in str(error.value)


def test_an_incomplete_model_is_refused(tmp_path):
    """P6: the error for missing weights names the expected path and the layout."""
    with pytest.raises(UserError, match=r"nowhere is not a folder \| The layout is"):
        HunyuanVideoPipeline.from_pretrained(tmp_path / "nowhere", device="cpu")


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_the_video_is_that_of_the_reference_pipeline(toy, pipeline, cfg_scale):
    """Spec, end to end: equal to diffusers' pipeline with the same weights, text embeddings and noise."""
    # Imported here, because the ranks of another test import this module and importing diffusers takes seconds.
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
    from diffusers import HunyuanVideoPipeline as ReferencePipeline

    from tests.support.dit_reference import reference_model

    params = replace(PARAMS, cfg_scale=cfg_scale)
    tree, cpu = CheckpointTree(toy), torch.device("cpu")
    dit = load_dit(tree, pipeline._denoiser._model.config, "sdpa", torch.float32, cpu)
    vae = AutoencoderKLHunyuanVideo(**TOY_VAE)
    vae.load_state_dict(load_vae(tree, torch.float32, cpu).state_dict())
    reference = ReferencePipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=reference_model(dit),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=params.flow_shift),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    reference.set_progress_bar_config(disable=True)
    texts = pipeline._text_encoder.encode([params.prompt, params.negative_prompt], image=False)
    embeds = {}
    for prefix, text in zip(("", "negative_"), texts, strict=True):
        embeds |= {
            f"{prefix}prompt_embeds": text.states[None],
            f"{prefix}prompt_attention_mask": torch.ones(1, len(text.states)),
            f"{prefix}pooled_prompt_embeds": text.pooled[None],
        }
    expected = reference(
        **embeds,
        **SMALL,
        true_cfg_scale=cfg_scale,
        guidance_scale=params.guidance_scale,
        latents=initial_noise(params),
        output_type="np",
    ).frames[0]
    frames = np.concatenate(list(pipeline.stream(params)))
    assert np.abs(frames / 255 - expected).max() <= 1.01 / 255  # hv_batch truncates to 8 bits, as the release does


def test_an_overflowing_sample_is_distinguished_from_a_faulty_device(toy):
    """P5: after latents that are not finite, the self-check decides: NonFiniteError if it passes, else DeviceError."""
    engine = HunyuanVideo(model_base=toy, **OPTIONS)
    [text] = engine.text_encoder("cpu").encode([PROMPT], image=False)
    denoiser = engine.join(rank_spec(0, 1, ""))
    overflowing = replace(text, states=torch.full_like(text.states, float("inf")))
    with pytest.raises(NonFiniteError, match="not finite after step 1 of 3"):
        denoiser.denoise(PARAMS, overflowing, None, lambda done, read: None)
    assert np.isfinite(denoiser.denoise(PARAMS, text, None, lambda done, read: None)).all()
    denoiser._model.final_layer.linear.weight.data.fill_(float("nan"))
    with pytest.raises(DeviceError, match="rank 0 alone computes values that are not finite"):
        denoiser.denoise(PARAMS, text, None, lambda done, read: None)


def _render_rank(rank, world_size, engine, address, arguments, results):
    denoiser = engine.join(rank_spec(rank, world_size, address))
    states = {}
    latents = [denoiser.denoise(*arguments, lambda n, read: states.setdefault(n, read())) for _ in range(2)]
    latents += [denoiser.denoise(*arguments, lambda n, read: None, states[n]) for n in (1, 2)]
    np.save(results / f"{rank}.npy", np.stack(latents))
    leave_group()  # exiting with a live process group sometimes aborts the process


@pytest.mark.slow
def test_a_group_of_two_ranks_denoises_what_one_does(toy, pipeline, tmp_path):
    """Protocol `Denoiser.denoise`: the latents are equal on every rank, in the next call, and after a resume from any
    step (P4); they equal those of one rank up to rounding."""
    params = replace(PARAMS, cfg_scale=3.0)
    arguments = params, *pipeline._text_encoder.encode([params.prompt, params.negative_prompt], image=False)
    engine = HunyuanVideo(model_base=toy, **OPTIONS)
    address = engine.host_rendezvous("127.0.0.1", 2)
    multiprocessing.spawn(_render_rank, (2, engine, address, arguments, tmp_path), nprocs=2)
    every, other = np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy")
    first = every[0]
    assert first.dtype == np.float32
    assert first.shape == PARAMS.latent_shape
    assert all(np.array_equal(first, again) for again in every[1:])
    assert np.array_equal(every, other)
    alone = pipeline._denoiser.denoise(*arguments, lambda n, read: None)
    np.testing.assert_allclose(first, alone, rtol=0, atol=1e-4)


def test_the_decoder_refuses_latents_of_another_shape(pipeline):
    """Protocol `Decoder.decode`: latents that are not [C, T, h, w] are refused before any work."""
    for shape in ((1, 16, 3, 4, 6), (8, 3, 4, 6)):
        with pytest.raises(ValueError, match=r"latents must be shaped \[16, T, h, w\]"):
            pipeline._decoder.decode(np.zeros(shape, np.float32))


def test_the_decoder_refuses_frames_that_are_not_finite(pipeline):
    """P5: an overflow raises an error and does not become a black video."""
    latents = np.zeros((16, 1, 4, 6), np.float32)
    latents[0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        list(pipeline._decoder.decode(latents))


def test_the_decoder_takes_read_only_latents(pipeline, recwarn):
    """Latents from the object store are read-only."""
    latents = np.zeros((16, 1, 4, 6), np.float32)
    latents.flags.writeable = False
    assert next(iter(pipeline._decoder.decode(latents))).shape == (1, 32, 48, 3)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_an_engine_is_built_without_weights_or_devices(tmp_path):
    """Protocol `Engine`: the constructor reads no weights; `check` reports a missing model (P6)."""
    engine = HunyuanVideo(model_base=tmp_path / "nowhere")
    sentence, _layout = engine.check()
    assert "nowhere is not a folder" in sentence
    with pytest.raises(UserError, match="nowhere is not a folder"):
        engine.identity()


def test_importing_the_engine_loads_no_heavy_library():
    """Design sections 2 and 8: importing the engine imports neither Ray nor transformers nor GPU packages."""
    code = (
        "import sys, hv_batch.engine.hunyuan, torch\n"
        "heavy = {'ray', 'transformers', 'diffusers', 'flash_attn', 'xfuser', 'triton'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float16"}, "precision: 'float16' is not allowed; allowed are bf16, fp16, fp32"),
        ({"vae_precision": ["fp16"]}, r"vae_precision: \['fp16'\] is not allowed"),
        ({"text_encoder_precision": None}, "text_encoder_precision: None is not allowed"),
        ({"attention": "sage"}, "attention: 'sage' is not allowed; allowed are math, sdpa, cudnn, flash"),
        ({"attention": "cudnn", "precision": "fp32"}, "attention: cudnn computes in half precision only"),
        ({"load_key": "state"}, "load_key: 'state' is not allowed; allowed are module, ema"),
        ({"dit": {"hidden": 64}}, "dit: unknown 'hidden'; allowed are in_channels.*hidden_size"),
        ({"dit": {"hidden_size": 100}}, "hidden_size"),
        ({"dit": {"hidden_size": "big"}}, "dit"),
        ({"dit": {"heads_num": 0}}, "dit"),
        ({"dit": "toy"}, "dit: 'toy' must map names to values"),
        ({"vae_tile": {"size": 256}}, "vae_tile: unknown 'size'; allowed are spatial_px"),
        ({"vae_tile": {"overlap": 2}}, "overlap"),
        ({"step_cache": 0.1}, r"step_cache: 0\.1 .*hv_batch 0\.2\.0.*step_cache: \{kind: schedule, computed: 16\}"),
        ({"step_cache": "0.1"}, "step_cache: '0.1' is not allowed; allowed is a mapping"),
        ({"sparse_attention": 0.3}, "sparse_attention: 0.3 is not allowed; give a mapping with density"),
        ({"step_cache": True}, "step_cache: True is not allowed"),
        ({"step_cache": {"kind": "schedule", "computed": 51}}, r"computed must be a whole number from 2 to 50 \(of\)"),
        ({"cfg_until": 0}, "cfg_until: 0 is not allowed; allowed is a number above 0 and at most 1"),
        ({"model_base": ""}, "model_base: '' is not a path"),
        ({"dit_weight": 3}, "dit_weight: 3 is not a path"),
    ],
)
def test_a_wrong_option_is_reported_with_the_allowed_values(options, message):
    """P6: the error names the option, its value and the allowed values."""
    with pytest.raises(UserError, match=message):
        HunyuanVideo(**{"model_base": "ckpts", **options})


def test_the_identity_survives_json_and_moves_with_the_options(toy):
    """P2, P3: the identity is stored in run.json as JSON; every option that changes pixels changes it."""
    identity = HunyuanVideo(model_base=toy, **OPTIONS).identity()
    assert json.loads(json.dumps(identity)) == identity
    as_yaml = json.loads(json.dumps(OPTIONS))  # lists for tuples
    assert HunyuanVideo(model_base=str(toy), **as_yaml).identity() == identity
    for change in (
        {"precision": "bf16"},
        {"vae_precision": "bf16"},
        {"text_encoder_precision": "bf16"},
        {"attention": "math"},
        {"fuse_pointwise": True},
        {"load_key": "ema"},
        {"step_cache": {"kind": "schedule", "computed": 16}},
        {"step_cache": {"kind": "schedule", "computed": 16, "order": 1}},
        {"cfg_until": 0.5},
        {"sparse_attention": {"density": 0.3}},
        {"quantized_attention": {"qk": "int8", "backend": "reference"}},
        {"vae_tile": {"overlap": 0.5}},
        {"dit": {**TOY_DIT, "mm_single_blocks_depth": 1}},
    ):
        assert HunyuanVideo(model_base=toy, **{**OPTIONS, **change}).identity() != identity, change


def test_a_plan_that_does_not_divide_the_heads_is_reported_with_alternatives():
    """Design section 5: Ulysses must divide the heads, ring may be any number. P6: the remedy keeps the ranks."""
    engine = HunyuanVideo(model_base="ckpts")
    for u, r in ((1, 1), (8, 1), (24, 1), (3, 5), (1, 7)):
        assert engine.group_problems(ParallelPlan(ulysses_degree=u, ring_degree=r)) == []
    (sentence,) = engine.group_problems(ParallelPlan(ulysses_degree=16))
    assert "ulysses_degree 16 does not divide the model's 24 attention heads" in sentence
    assert "1 x 16, 2 x 8, 4 x 4, 8 x 2" in sentence
    assert "16 x 1" not in sentence
    assert sentence.endswith("; with cfg_degree 2 also 1 x 8, 2 x 4, 4 x 2, 8 x 1")
    (sentence,) = engine.group_problems(ParallelPlan(ulysses_degree=5))
    assert sentence.endswith("with 5 ranks, ulysses_degree x ring_degree may be 1 x 5")


def test_a_gated_negative_branch_gets_no_ranks_of_its_own():
    """P6: cfg_until with cfg_degree 2 is refused with the reason."""
    (sentence,) = HunyuanVideo(model_base="ckpts", cfg_until=0.5).group_problems(ParallelPlan(cfg_degree=2))
    assert "would wait in all steps after cfg_until 0.5 of them; remove cfg_until, or choose cfg_degree 1" in sentence


def test_a_plan_that_divides_the_keys_is_refused_for_sparse_attention():
    """P6: block selection needs all tokens of a head, so a ring and xfuser are refused with a reason."""
    engine = HunyuanVideo(model_base="ckpts", sparse_attention={"density": 0.3})
    assert engine.group_problems(ParallelPlan(ulysses_degree=8, cfg_degree=2)) == []
    (sentence,) = engine.group_problems(ParallelPlan(ulysses_degree=2, ring_degree=2))
    assert "sparse_attention chooses the keys of a head among all tokens" in sentence
    assert "use ring_degree 1" in sentence
    xfuser = HunyuanVideo(model_base="ckpts", sparse_attention={"density": 0.3}, sequence_parallel="xfuser")
    (sentence,) = xfuser.group_problems(ParallelPlan(ulysses_degree=2))
    assert "sparse_attention needs sequence_parallel 'native'" in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_a_missing_gpu_is_reported(toy):
    """P6: the error names the GPU that is needed, the number of visible GPUs and the setting to change."""
    with pytest.raises(UserError, match="needs GPU number 0, but this process sees 0 GPUs"):
        HunyuanVideo(model_base=toy, **OPTIONS).decoder("cuda")
