"""hv_batch.toy.training: it writes a checkpoint that the engine loads, and its faster functions are equivalent."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.engine.text_encoders import TextTowers
from hv_batch.toy.captions import captioned_scenes
from hv_batch.toy.training import dit, lean, towers, vae
from hv_batch.toy.training.labels import CLASSES, labels
from hv_batch.toy.training.lean import lean_steps, make_lean_vae
from hv_batch.toy.training.scenes import Phase, Scenes, batches
from hv_batch.toy.world import draw

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a checkpoint after a few steps of each part, and the trained VAE."""
    root = tmp_path_factory.mktemp("trained")
    towers.train_towers(root, towers.Settings(steps=2, batch=2), CPU)
    phases = (Phase(2, 2, 1, 32, 32), Phase(1, 1, 5, 32, 48))
    model = vae.train_vae(root, vae.Settings(phases=phases, measured=2), CPU)
    frozen = TextTowers(root / "text_encoder", root / "text_encoder_2", device=CPU, dtype=torch.float32)
    sets = tuple(dit.TrainingSet(phase, scenes=2) for phase in phases)
    stages = (dit.Stage(sets, rate=1.0, decay=0.0), dit.Stage(sets, rate=0.5, decay=1.0))
    dit.train_dit(root, model, frozen, dit.Settings(stages=stages), CPU)
    return root, model


@pytest.mark.slow
def test_a_trained_checkpoint_renders(trained):
    """Spec 7: the engine loads the trained tree without options, as a released one, and renders a video."""
    pipeline = HunyuanVideoPipeline.from_pretrained(trained[0], device="cpu")
    frames = pipeline("a red circle on a blue background", height=32, width=48, num_frames=5, num_inference_steps=2)
    assert frames.shape == (5, 32, 48, 3)
    assert frames.dtype == np.uint8


@pytest.mark.slow
def test_a_trained_vae_is_loaded_again(trained):
    """An interrupted training keeps the finished VAE."""
    again = vae.load_vae(trained[0], CPU).state_dict()
    assert all(torch.equal(again[name], tensor.half().float()) for name, tensor in trained[1].state_dict().items())


def test_a_saved_dit_is_loaded_again(tmp_path):
    """A stage starts from all weights that the previous stage has saved."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(**dit.WIDTHS, text_embed_dim=96, pooled_projection_dim=64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    dit.save_dit(tmp_path, model)
    again = dit.load_dit(tmp_path, model.state_dict())
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], one.bfloat16().float()) for name, one in model.state_dict().items())


def test_images_do_not_train_the_taps_of_past_frames(tmp_path):
    """After training on images only, the kernel taps of past frames are zero, so motion is not blurred."""
    settings = vae.Settings(phases=(Phase(2, 2, 1, 32, 32),), measured=2)
    kernels = [one for one in vae.train_vae(tmp_path, settings, CPU).parameters() if one.ndim == 5]
    assert kernels
    assert all(one[:, :, :-1].eq(0).all() and one[:, :, -1].ne(0).any() for one in kernels)


def test_normalizing_latents_does_not_change_pixels():
    """Spec 5: scaled latents have mean 0 and standard deviation 1 in every channel, and the decode is unchanged."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    model = AutoencoderKLHunyuanVideo(**vae.WIDTHS, scaling_factor=vae.SCALING)
    measured = [*vae.pixel_batches(Phase(3, 1, 5, 32, 32), 3, CPU)]
    with torch.no_grad():
        before = [model.decode(model.encode(pixels).latent_dist.mode()).sample for pixels in measured]
        vae.normalise_latents(model, measured)
        after = [model.decode(model.encode(pixels).latent_dist.mode()).sample for pixels in measured]
        latents = torch.cat([model.encode(p).latent_dist.mode().transpose(0, 1).flatten(1) for p in measured], dim=1)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    scaled = latents * vae.SCALING
    torch.testing.assert_close(scaled.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(1), torch.ones(16), atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 5])
def test_the_lean_vae_is_the_same_function(num_frames):
    """The faster VAE gives the same pixels and gradients as the forward functions of diffusers."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    plain = AutoencoderKLHunyuanVideo(**vae.WIDTHS)
    quick = make_lean_vae(copy.deepcopy(plain))
    pixels = torch.rand(2, 3, num_frames, 24, 32)
    shown = [model.decode(model.encode(pixels).latent_dist.mode()).sample for model in (plain, quick)]
    torch.testing.assert_close(*shown, atol=1e-5, rtol=1e-4)
    for one in shown:
        one.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), quick.parameters(), strict=True):
        tolerance = 1e-6 + 1e-3 * one.grad.abs().max().item()
        torch.testing.assert_close(one.grad, other.grad, atol=tolerance, rtol=0, msg=name)


def test_lean_attention_is_the_same_function(monkeypatch):
    """The DiT gives the same output as with PyTorch's attention, also with padded texts."""
    from diffusers import HunyuanVideoTransformer3DModel

    monkeypatch.setattr(lean, "_has_bfloat16", lambda: True)
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(**dit.WIDTHS, text_embed_dim=96, pooled_projection_dim=64)
    inputs = {
        "hidden_states": torch.randn(2, 16, 3, 4, 6),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 7, 96),
        "encoder_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3]),
        "pooled_projections": torch.randn(2, 64),
        "guidance": torch.full((2,), dit.GUIDANCE),
        "return_dict": False,
    }
    [plain] = model(**inputs)
    with lean_steps(CPU):
        [quick] = model(**inputs)
    torch.testing.assert_close(plain, quick, atol=1e-5, rtol=1e-4)


def test_stacked_muon_takes_the_same_steps(monkeypatch):
    """The steps equal those of PyTorch's Muon within rounding, both in bfloat16 and in float32."""
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=generator) for shape in ((24, 8), (24, 8), (8, 24), (16, 16))]
    gradients = [[torch.randn(one.shape, generator=generator) for one in first] for _ in range(3)]

    def walk(optimizer, **options):
        matrices = [torch.nn.Parameter(one.clone()) for one in first]
        steps = optimizer(matrices, lr=0.1, weight_decay=0.1, **options)
        for given in gradients:
            for matrix, gradient in zip(matrices, given, strict=True):
                matrix.grad = gradient.clone()
            steps.step()
        return [(matrix - one).detach() for matrix, one in zip(matrices, first, strict=True)]

    expected = walk(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    for has_bfloat16 in (True, False):
        monkeypatch.setattr(lean, "_has_bfloat16", lambda answer=has_bfloat16: answer)
        for moved, way in zip(walk(lean.StackedMuon), expected, strict=True):
            assert (moved - way).norm() < 0.02 * way.norm()


def test_batches_do_not_depend_on_the_number_of_processes():
    """Several worker processes and a single process give the same batches in the same order."""

    def drawn(scene, rng):
        return draw(scene, 5, 32, 48, rng)

    series = [[*batches(Scenes(3, 7, 5, drawn), 3, torch.device(kind))] for kind in ("cuda", "cpu")]
    assert [len(batch) for batch in series[0]] == [3, 3, 1]
    assert all(torch.equal(one, other) for one, other in zip(*series, strict=True))
    assert not torch.equal(series[0][0], series[0][1])


def test_labels_determine_the_scene():
    """Scenes with equal labels are equal, and every label is within its range."""
    series = captioned_scenes(0, 33, held_out=False)
    by_labels = {}
    for _ in range(500):
        scene, _ = next(series)
        classes = labels(scene)
        assert all(0 <= classes[name] < count for name, count in CLASSES.items())
        assert by_labels.setdefault(tuple(classes.values()), scene) == scene
