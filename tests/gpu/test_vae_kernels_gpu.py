"""The VAE's norms in Triton against float64, and a decode with Triton against one without."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hv_batch.architecture import VAEConfig
from hv_batch.engine.vae import kernels
from hv_batch.engine.vae.kernels import in_layout, pad
from hv_batch.engine.vae.model import CausalVAE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_norm(channels, groups=32):
    norm = nn.GroupNorm(groups, channels, eps=1e-6).cuda().requires_grad_(False)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias, 0.0, 0.3)
    return norm


def plainly(norm, x, front):
    wide = F.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return pad(F.silu(wide), front)


@pytest.fixture
def fused():
    fused_kernels = kernels._gpu_kernels(torch.zeros(1, device="cuda").device)
    assert fused_kernels is not None, "there is no Triton, or no C compiler"
    return fused_kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("front", [0, 2])
@pytest.mark.parametrize(
    "shape", [(1, 64, 5, 17, 13), (2, 96, 3, 8, 9), (1, 1024, 1, 5, 7), (2, 128, 9, 64, 64)], ids=str
)
def test_any_shape(shape, front, dtype, fused):
    """Spec section 5: accurate for one and many frames, odd sides, more channels than a program holds, and any mean."""
    torch.manual_seed(0)
    norm, mean = random_norm(shape[1]), 1000 if dtype is torch.float32 else 4
    x = in_layout((torch.randn(shape, device="cuda") + mean).to(dtype))
    result = fused(norm, x, front)
    expected = plainly(norm, x, front)
    assert result.dtype is dtype
    assert result.shape == expected.shape
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((result - expected).abs() <= rounding + 3e-4).all(), "float32 allows no more accuracy at a mean of 1000"
    assert torch.equal(result, fused(norm, x, front)), "equal inputs, equal bits"


def test_an_outlier_costs_no_accuracy(fused):
    """A group whose first number is an outlier of a thousand deviations is accurate, because the pivot is a mean."""
    torch.manual_seed(0)
    norm, x = random_norm(32), torch.randn(1, 32, 3, 40, 40, device="cuda")
    x[..., 0, 0, 0] = 1000
    assert (fused(norm, in_layout(x), 0) - plainly(norm, x, 0)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decode_without_triton_is_the_same(dtype, monkeypatch, caplog):
    """A GPU without Triton or a compiler decodes the same pixels, and logs one warning that it is slower."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = CausalVAE(VAEConfig(block_out_channels=(64, 64, 128, 128))).to("cuda", dtype).requires_grad_(False)
    z = torch.randn(1, 16, 5, 12, 10, device="cuda", dtype=dtype)
    result = vae.decode(z)

    def without(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("hv_batch.engine.vae.triton_kernels.norm_silu_pad", without)
    kernels._gpu_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="hv_batch.engine.vae.kernels"):
            expected = vae.decode(z)
            assert torch.equal(expected, vae.decode(z))
    finally:
        kernels._gpu_kernels.cache_clear()
    (message,) = [message for message in caplog.messages if "Triton" in message]
    assert "Failed to find C compiler" in message
    error = ((result - expected).float().norm() / expected.float().norm()).item()
    assert error <= (1e-5 if dtype is torch.float32 else 4e-2)
