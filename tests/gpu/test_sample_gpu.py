"""The single-process pipeline on CUDA at toy width, against the CPU, a second run and several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hv_batch.cli.sample import command as sample
from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.engine.sampling.sampler import initial_noise
from hv_batch.sampling_params import SamplingParams
from hv_batch.toy.checkpoint import write_toy_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPT = "A cat walks on the grass, realistic."
FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
# bfloat16 can represent guidance 4000; see tests/engine/test_precision.py.
CHOICE = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 8, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


def error(result, expected):
    return float(np.sqrt(np.square(result - expected).mean() / np.square(expected).mean()))


@pytest.fixture
def exact(monkeypatch):
    """float32 without TF32, which PyTorch allows convolutions by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 0.03), ("fp16", 0.004)])
def test_eight_steps_are_those_of_the_cpu(base, precision, bound):
    """P3: with CPU noise, the trajectory equals that of the CPU, within the bounds of the 16-bit paths on the CPU."""
    loaded = (
        HunyuanVideoPipeline.from_pretrained(base, device=device, **{**FP32, "precision": chosen})
        for device, chosen in (("cpu", "fp32"), ("cuda", precision))
    )
    expected, result = (pipeline(PROMPT, cfg_scale=3.0, output="latents", **CHOICE) for pipeline in loaded)
    assert error(result, expected) < bound


def test_the_official_noise_is_that_of_the_device():
    """Spec section 4: official noise uses a CUDA generator in the dtype of the prompt embedding, and is repeatable."""
    params = SamplingParams(
        prompt="a",
        negative_prompt="",
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=1,
        seed=3,
        guidance_scale=6.0,
        cfg_scale=1.0,
        guidance_rescale=0.0,
        flow_shift=7.0,
    )
    drawn = [initial_noise(params, torch.float16, "cuda") for _ in range(2)]
    assert torch.equal(*drawn)
    assert drawn[0].dtype is torch.float16
    assert not torch.equal(drawn[0].cpu(), initial_noise(params, torch.float16))


def test_reproduce_gives_equal_bytes(base, tmp_path, capsys):
    """`--reproduce` in the released precisions uses deterministic kernels only and gives equal frames."""
    flags = ["--model-base", str(base), "--video-size", "64", "96", "--video-length", "9", "--infer-steps", "4"]
    flags += ["--prompt", PROMPT, "--seed", "1", "--noise", "official", "--device", "cuda", "--reproduce"]
    try:
        for _ in range(2):
            assert sample.main([*flags, "--save-path", str(tmp_path)]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    videos = [Path(line) for line in capsys.readouterr().out.splitlines()]
    first, again = (json.loads(video.with_name(video.stem + ".json").read_text()) for video in videos)
    assert first["frames_sha256"] == again["frames_sha256"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
def test_a_group_over_nccl_renders_what_one_gpu_does(base, degrees):
    """Spec section 8: two GPUs equal one GPU up to rounding, with Ulysses and with ring."""
    expected = HunyuanVideoPipeline.from_pretrained(base, device="cuda", **FP32)(PROMPT, output="latents", **CHOICE)
    with HunyuanVideoPipeline.from_pretrained(
        base, device="cuda", ulysses_degree=degrees[0], ring_degree=degrees[1], **FP32
    ) as pipeline:
        assert error(pipeline(PROMPT, output="latents", **CHOICE), expected) < 1e-3
