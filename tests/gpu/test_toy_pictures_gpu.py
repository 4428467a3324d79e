"""The trained toy model on a GPU: the picture shows the content of the prompt with every way of computing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.toy.accuracy import PROMPTS_SEED
from hv_batch.toy.captions import captioned_scenes
from hv_batch.toy.scorer import score
from hv_batch.toy.trained import write_trained_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Options, and the least PSNR in dB against float32 with SDPA on the same device.
WAYS = {
    "bf16, sdpa": ({"precision": "bf16"}, 42),
    "bf16, cudnn": ({"precision": "bf16", "attention": "cudnn"}, 42),
    "fp16, cudnn": ({"precision": "fp16", "attention": "cudnn"}, 58),
    "as a render": ({"precision": "bf16", "attention": "cudnn", "vae_precision": "fp16"}, 42),
    "step cache": ({"step_cache": {"kind": "schedule", "computed": 23}}, 38),
}
FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_trained_checkpoint(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def captioned():
    """A scene and its prompt."""
    return next(captioned_scenes(PROMPTS_SEED, 33, held_out=True))


def render(base, prompt, options):
    with HunyuanVideoPipeline.from_pretrained(base, device="cuda", **FP32 | options) as pipeline:
        return pipeline(prompt, height=128, width=128, num_frames=33, num_inference_steps=20, seed=3)


@pytest.fixture(scope="module")
def reference(trained, captioned):
    return render(trained, captioned[1], {})


def psnr(one, other):
    error = np.square(one.astype(np.float64) - other).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize("way", WAYS)
def test_the_picture_shows_the_same_content_in_every_way(trained, captioned, reference, way):
    """P3: each way gives equal bits twice. The ways differ in bits, but the scored attributes are equal."""
    options, least_psnr = WAYS[way]
    scene, prompt = captioned
    frames = render(trained, prompt, options)
    print(f"{way}: {psnr(frames, reference):.1f} dB")
    assert psnr(frames, reference) > least_psnr
    assert score(scene, frames).right == score(scene, reference).right
    assert np.array_equal(frames, render(trained, prompt, options))
