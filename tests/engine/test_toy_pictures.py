"""The trained VAE as a yardstick: scenes survive it, and no way to compute a decode changes what is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.toy.accuracy import PROMPTS_SEED, shares
from hv_batch.toy.captions import told_scenes
from hv_batch.toy.checkpoint import write_toy_checkpoint
from hv_batch.toy.scorer import score
from hv_batch.toy.trained import SHIPPED, pack, unpack
from hv_batch.toy.training.vae import SCALING, load_vae, to_pixels
from hv_batch.toy.world import draw

ROOT = Path(__file__).parents[2]
FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
SIZE = {"height": 128, "width": 128, "num_frames": 33}
LIMIT = 16_000_000  # bytes of weights in the package
# Options that compute the same decode another way, and how near (PSNR, dB) its frames must be to those of float32.
DECODES = {
    "fp16": ({"vae_precision": "fp16"}, 45),
    "bf16": ({"vae_precision": "bf16"}, 35),
    "tiled": ({"vae_tile": {"spatial_px": 96}}, 20),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("trained")
    unpack(base)
    return base


def code(base, count, num_frames):
    """Held-out scenes: the scene, its frames [F, H, W, 3], and what the encoder makes of them [16, T, h, w]."""
    model = load_vae(base, torch.device("cpu"))
    found = []
    for scene, _ in islice(told_scenes(PROMPTS_SEED, num_frames, held_out=True), count):
        frames = draw(scene, num_frames, SIZE["height"], SIZE["width"])
        with torch.no_grad():
            latents = model.encode(to_pixels(frames[None])).latent_dist.mode()
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


@pytest.mark.parametrize(("count", "num_frames", "quality"), [(8, 1, 26), (3, SIZE["num_frames"], 24)])
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
    options, nearness = DECODES[way]
    scene, _, latents = coded[1]
    plain, other = decoded(trained, latents, {}), decoded(trained, latents, options)
    assert nearness < psnr(other, plain) < 90
    assert score(scene, other).right == score(scene, plain).right


def psnr(one, other):
    error = np.square(one.astype(np.float64) - other).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


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
