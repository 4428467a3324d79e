"""The bench on a GPU, and that a GPU decodes and predicts what the CPU does, whose layout and kernels are others."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from hv_batch.cli import app
from hv_batch.engine.dit import DiTConfig
from hv_batch.engine.vae import CausalVAE, VAEConfig
from hv_batch.toy.checkpoint import TOY_DIT
from tests.engine.dit_reference import random_dit, random_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_stage_is_timed_with_its_memory():
    """The same command on the device that is there; memory is that of the CUDA allocator."""
    result = CliRunner().invoke(app, ["bench", "engine", "--preset", "toy", "--device", "cuda", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["machine"].startswith("cuda")
    assert [report["stage"] for report in found["stages"]] == ["text", "dit", "vae"]
    assert all(report["best_s"] > 0 and report["peak_gb"] > 0 for report in found["stages"])


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_decoder_is_the_cpus(exact, frames):
    """float32 without TF32: channels-last on the CPU and not on the GPU, one result."""
    torch.manual_seed(0)
    vae = CausalVAE(VAEConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8))
    vae.requires_grad_(False)
    z = torch.randn(1, 16, frames, 6, 5)
    expected = vae.decode(z)
    assert (vae.cuda().decode(z.cuda()).cpu() - expected).abs().max() <= 1e-4


def test_the_transformer_is_the_cpus(exact):
    """float32 without TF32: normalised, rotated and gated in place on both."""
    config = DiTConfig(**TOY_DIT)
    model = random_dit(config, seed=1)
    inputs = random_inputs(config, (3, 8, 8), [7], seed=2, padded=9)
    expected = model(**inputs)
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    assert (model.cuda()(**inputs).cpu() - expected).abs().max() <= 1e-4
