"""The DiT and the VAE on a GPU against the CPU, which uses another layout and other kernels, in every precision."""

from __future__ import annotations

import pytest
import torch

from hv_batch.architecture import DiTConfig
from hv_batch.engine.vae.kernels import norm_silu_pad
from hv_batch.toy.checkpoint import TOY_DIT
from tests.support.dit_reference import random_dit, random_inputs
from tests.support.vae_reference import NARROW, relative_error, vae_pair

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Relative root mean square against float32, as on the CPU: tests/engine/test_precision.py and test_vae.py.
FORWARD = {torch.bfloat16: 0.02, torch.float16: 0.0025}
DECODE = {torch.bfloat16: 0.032, torch.float16: 0.004}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """float32 without TF32, which PyTorch allows convolutions by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def on_gpu(inputs: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@pytest.mark.parametrize("frames", [1, 3])
def test_the_decoder_is_the_cpus(frames):
    """The decoder gives equal results on CPU and GPU."""
    vae, _ = vae_pair(NARROW)
    z = torch.randn(1, 16, frames, 6, 5)
    expected = vae.decode(z)
    assert (vae.cuda().decode(z.cuda()).cpu() - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", DECODE, ids=str)
def test_half_precision_decodes_as_the_release_does(dtype):
    """Spec section 5: the error is at most 1.2 times that of the reference under the release's real autocast."""
    ours, theirs = vae_pair(NARROW)
    z = torch.randn(1, 16, 3, 8, 6)
    expected = ours.decode(z)
    with torch.autocast("cuda", dtype=dtype), torch.no_grad():
        released = theirs.to("cuda", dtype).decode(z.to("cuda", dtype), return_dict=False)[0]
    result = ours.to("cuda", dtype).decode(z.to("cuda", dtype))
    assert result.dtype is dtype
    error = relative_error(released.cpu(), expected)
    assert relative_error(result.cpu(), expected) <= 1.2 * error < DECODE[dtype]


def test_a_norm_at_the_size_of_a_tile():
    """The largest norm of a released tile is accurate: 17 million elements per group, with a mean far from zero."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, 128, eps=1e-6).cuda().requires_grad_(False)
    x = torch.randn(1, 128, 65, 256, 256, device="cuda", dtype=torch.float16) * 2 + 5
    result = norm_silu_pad(norm, x, 2)[:, :, 2:, 1:-1, 1:-1]
    for group in range(0, 128, 32):  # a few groups only, because each takes 136 MB in float64
        expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x[:, group : group + 4].double(), 1))
        assert (result[:, group : group + 4].double() - expected).abs().max() <= 2e-3  # half a unit of float16 near 4


def test_the_transformer_is_the_cpus():
    """The transformer gives equal results on CPU and GPU, with in-place operations on both."""
    config = DiTConfig(**TOY_DIT)
    model = random_dit(config, seed=1)
    inputs = random_inputs(config, (3, 8, 8), [7], seed=2, padded=9)
    expected = model(**inputs)
    assert (model.cuda()(**on_gpu(inputs)).cpu() - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_half_precision_predicts_as_on_the_cpu(dtype):
    """Spec section 1, `--precision`: the error bounds of the CPU hold, with two texts of different lengths."""
    config = DiTConfig(**TOY_DIT)
    model = random_dit(config, seed=0)
    inputs = random_inputs(config, (3, 8, 12), [7, 12], seed=0, padded=12)
    inputs |= {"guidance": torch.full((2,), 4000.0), "timestep": torch.tensor([1000.0, 500.0])}
    expected = model(**inputs)
    result = model.to("cuda", dtype)(**on_gpu(inputs))
    assert result.dtype is dtype
    assert relative_error(result.cpu(), expected) < FORWARD[dtype]
