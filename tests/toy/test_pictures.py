"""The trained toy as a yardstick: what prompts say is in the picture, and no way to compute it changes what is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.pipeline import HunyuanVideoPipeline, plan_videos
from hv_batch.protocol import DEFAULT_NEGATIVE_PROMPT, StepState
from hv_batch.toy.accuracy import PROMPTS_SEED, rendered, shares
from hv_batch.toy.captions import told_scenes
from hv_batch.toy.checkpoint import dit_file, write_toy_checkpoint
from hv_batch.toy.scorer import score
from hv_batch.toy.trained import SHIPPED, pack, write_trained_checkpoint
from hv_batch.toy.training.scenes import to_pixels
from hv_batch.toy.training.vae import SCALING, load_vae
from hv_batch.toy.world import draw
from hv_batch.weights.conversion import Recipe, convert
from tests.support.repository import ROOT

CPU = torch.device("cpu")
FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
SIZE = {"height": 128, "width": 128, "num_frames": 33}
SHORT = SIZE | {"num_frames": 17}  # what ways of rendering are compared by
STEPS = 12
PLAIN = {
    "negative_prompt": DEFAULT_NEGATIVE_PROMPT,
    "guidance_scale": 6.0,
    "cfg_scale": 1.0,
    "guidance_rescale": 0.0,
    "flow_shift": 7.0,
}
LIMIT = 16_000_000  # bytes of weights in the package
# Options that compute the same decode another way, and how near (PSNR, dB) its frames must be to those of float32.
# Last, of how many latent frames: CPUs without instructions for bfloat16 take half a minute for two.
DECODES = {
    "fp16": ({"vae_precision": "fp16"}, 58, 9),
    "bf16": ({"vae_precision": "bf16"}, 35, 1),
    "tiled": ({"vae_tile": {"spatial_px": 96}}, 42, 9),
}
# The same for whole videos.
WAYS = {
    "bf16": ({"precision": "bf16"}, 42),
    "FP8 products": ({"fp8": "matmul"}, 40),
    "step cache": ({"step_cache": 0.1}, 48),
    "blocks offloaded": ({"offload": "blocks"}, 90),
    "two ranks": ({"ulysses_degree": 2}, 75),
    "ring of two": ({"ring_degree": 2}, 75),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    base = write_trained_checkpoint(root)
    assert write_trained_checkpoint(root) == base
    return base


def code(base, count, num_frames):
    """Held-out scenes: the scene, its frames [F, H, W, 3], and what the encoder makes of them [16, T, h, w]."""
    model = load_vae(base, CPU)
    found = []
    for scene, _ in islice(told_scenes(PROMPTS_SEED, num_frames, held_out=True), count):
        frames = draw(scene, num_frames, SIZE["height"], SIZE["width"])
        with torch.no_grad():
            latents = model.encode(to_pixels(torch.from_numpy(frames[None]), CPU)).latent_dist.mode()
        found.append((scene, frames, (SCALING * latents[0]).numpy()))
    return found


@pytest.fixture(scope="module")
def coded(trained):
    return code(trained, 3, SIZE["num_frames"])


def decoded(base, latents, options):
    decoder = HunyuanVideo(model_base=base, **FP32 | options).decoder("cpu")
    return np.concatenate(list(decoder.decode(latents)))


def test_what_is_unpacked_packs_to_the_same_bytes(trained, tmp_path):
    """P3: the shipped parts are those of the tree that the engine reads, and the other way round."""
    pack(trained, tmp_path)
    shipped = {file.relative_to(SHIPPED): file.read_bytes() for file in SHIPPED.rglob("*") if file.is_file()}
    assert {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == shipped


@pytest.mark.parametrize(("count", "num_frames", "quality"), [(8, 1, 30), (3, SIZE["num_frames"], 28)])
def test_the_vae_keeps_what_is_seen(trained, count, num_frames, quality):
    """Scenes that it was never trained with come back from their latents with all their attributes."""
    shown = [
        (scene, frames, decoded(trained, latents, {})) for scene, frames, latents in code(trained, count, num_frames)
    ]
    near = [psnr(frames, picture) for _, frames, picture in shown]
    assert np.mean(near) > quality, near
    found = shares(score(scene, picture) for scene, _, picture in shown)
    assert found["all"] >= 0.97, found


def test_latents_are_as_the_dit_wants_them(coded):
    """Spec 5: scaled latents have about mean 0 and deviation 1."""
    latents = np.concatenate([latents.reshape(16, -1) for _, _, latents in coded], axis=1)
    assert abs(latents.mean()) < 0.3
    assert 0.6 < latents.std() < 1.5


@pytest.mark.parametrize("way", DECODES)
def test_the_decode_is_the_same_in_every_way(trained, coded, way):
    """Precision and tiling may change bits, not what is seen."""
    options, nearness, length = DECODES[way]
    scene, _, latents = coded[1]
    latents = latents[:, :length]
    plain, other = decoded(trained, latents, {}), decoded(trained, latents, options)
    assert nearness < psnr(other, plain) < 90
    assert score(scene, other).right == score(scene, plain).right


def psnr(one, other):
    error = np.square(one.astype(np.float64) - other).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.fixture(scope="module")
def told():
    """A scene of the held-out ones with its prompt."""
    return next(told_scenes(PROMPTS_SEED, SHORT["num_frames"], held_out=True))


@pytest.fixture(scope="module")
def reference(trained, told):
    return render(trained, told, {})


def render(base, told, options):
    with HunyuanVideoPipeline.from_pretrained(base, device="cpu", **FP32 | options) as pipeline:
        return pipeline(told[1], **SHORT, num_inference_steps=STEPS, seed=3)


@pytest.mark.parametrize("way", WAYS)
def test_the_picture_is_the_same_in_every_way(trained, told, reference, way):
    """P3's weaker sister: other arithmetic may change bits, not what is seen."""
    options, nearness = WAYS[way]
    frames = render(trained, told, options)
    assert psnr(frames, reference) > nearness
    assert score(told[0], frames).right == score(told[0], reference).right


def test_fp8_weights_draw_the_same_picture(trained, told, reference, tmp_path):
    """Spec 6: weights in FP8 with a scale for each tensor."""
    convert(dit_file(trained), tmp_path / "out", Recipe(fp8=True))
    frames = render(trained, told, {"dit_weight": tmp_path / "out", "fp8": "storage"})
    assert psnr(frames, reference) > 40
    assert score(told[0], frames).right == score(told[0], reference).right


def test_a_resumed_trajectory_draws_the_same_picture(trained, told, reference):
    """P4: from a step checkpoint on, the rest is that of an undisturbed run, to the bit."""
    with HunyuanVideoPipeline.from_pretrained(trained, device="cpu", **FP32) as pipeline:
        [params] = plan_videos(told[1], 3, 1, **SHORT, **PLAIN, num_inference_steps=STEPS)
        [embedding] = pipeline.encode([params]).values()
        states = {}
        denoiser = pipeline._denoiser
        denoiser.denoise(params, embedding, None, lambda step, read: states.setdefault(step, read().copy()))
        half = StepState(STEPS // 2, states[STEPS // 2])
        latents = denoiser.denoise(params, embedding, None, lambda step, read: None, resume=half)
        frames = np.concatenate(list(pipeline.decode(latents)))
    assert np.array_equal(frames, reference)


ACCURACY = {
    "videos": (3, 33, 0.9),
    "pictures": (6, 1, 0.9),
    "200 videos": (200, 33, 0.95),
}


@pytest.mark.parametrize("what", ["videos", "pictures", pytest.param("200 videos", marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_what_prompts_say_is_in_the_picture(trained, what):
    """Prompts of combinations that the toy never saw, at 20 steps and its three sizes: the README's figures."""
    count, num_frames, share = ACCURACY[what]
    with HunyuanVideoPipeline.from_pretrained(trained, device="cpu", **FP32) as pipeline:
        told = rendered(pipeline, count, num_frames=num_frames, num_inference_steps=20, cfg_scale=3.0)
        found = shares(score(scene, frames) for scene, _, frames in told)
    assert found["all"] >= share, found


def test_the_package_is_small():
    """16 MB of weights at most travel with the package."""
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < LIMIT


def test_random_weights_show_little_of_what_they_are_told(tmp_path):
    """The measure of the toy tells a model that knows nothing: all attributes are judged, and most found wrong."""
    base = write_toy_checkpoint(tmp_path)
    command = [
        sys.executable,
        "-m",
        "hv_batch.toy.accuracy",
        str(base),
        "--prompts",
        "3",
        "--steps",
        "2",
        "--frames",
        "5",
    ]
    done = subprocess.run([*command, "--json"], cwd=ROOT, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"background", "pattern", "camera", "shape", "colour", "size", "motion", "all"}
    assert found["all"] < 0.5
    assert done.stderr.count("wrong: ") == 3
