"""The fused operations of the VAE against plain PyTorch operations, and the memory layout of its tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hv_batch.architecture import VAEConfig
from hv_batch.engine.vae import kernels
from hv_batch.engine.vae.blocks import CausalConv3d, UpsampleCausal3D
from hv_batch.engine.vae.kernels import convolve, in_layout, mix_channels, norm_silu_pad, normalise, pad
from hv_batch.engine.vae.model import CausalVAE

NARROW = VAEConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8)


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last_3d)


def random_norm(groups, channels):
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias, 0.0, 0.3)
    return norm


@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(2, 6)),
    groups=st.sampled_from([(1, 4), (4, 4), (2, 8), (8, 24)]),
    front=st.integers(0, 2),
    mean=st.sampled_from([0.0, 3.0, 1000.0]),
    frames_at_a_time=st.integers(1, 3),
)
@settings(max_examples=80, deadline=None)
def test_norm_silu_and_padding_in_one(batch, size, groups, front, mean, frames_at_a_time):
    """Spec section 5: the fused operation equals the three operations in sequence, with any chunks and any mean."""
    torch.manual_seed(0)
    count, channels = groups
    norm, x = random_norm(count, channels), torch.randn(batch, channels, *size) + mean
    expected = pad(F.silu(F.group_norm(x.double(), count, norm.weight.double(), norm.bias.double(), 1e-6)), front)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "CACHE_BYTES", frames_at_a_time * x[:, :, 0].numel() * 4)
        result = norm_silu_pad(norm, x, front)
    assert result.shape == expected.shape
    assert is_channels_last(result)
    # A number near 1000 is stored to 6e-5; the deviation of a group of one element is rounding only.
    tolerance = 2e-5 if mean < 10 else 2e-3
    assert (result - expected).abs().max() <= tolerance


def test_large_groups_are_summed_accurately():
    """Accuracy at the size of a tile's last level, at which PyTorch's GroupNorm of this layout is 1e-3 off."""
    torch.manual_seed(0)
    norm, x = random_norm(4, 4), in_layout(torch.randn(1, 4, 9, 256, 256) * 2 + 5)
    expected = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6))
    result = norm_silu_pad(norm, x, 0)[..., 1:-1, 1:-1]
    assert (result - expected).abs().max() <= 5e-6
    assert (F.silu(norm(x)) - expected).abs().max() > 1e-4, (
        "PyTorch has become accurate; the fused norm may no longer be needed"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_rounded_once(dtype):
    """Spec section 5: norm and SiLU are float32 for any dtype, as under the autocast of the release."""
    torch.manual_seed(0)
    norm, x = random_norm(2, 8).to(dtype), torch.randn(1, 8, 3, 5, 5).to(dtype)
    result, normed = norm_silu_pad(norm, x, 2), normalise(norm, x)
    norm = norm.float()
    assert torch.equal(result, norm_silu_pad(norm, x.float(), 2).to(dtype))
    assert torch.equal(normed, norm(x.float()).to(dtype))


@pytest.mark.parametrize("channels", [(3, 16), (16, 16), (16, 3), (32, 64), (64, 128)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_convolutions_are_pytorchs(channels, stride):
    """Convolutions of any width equal PyTorch's, and return channels-last tensors."""
    torch.manual_seed(0)
    narrow, wide = channels
    x, weight, bias = torch.randn(2, narrow, 5, 9, 8), torch.randn(wide, narrow, 3, 3, 3), torch.randn(wide)
    weight *= (27 * narrow) ** -0.5
    result = convolve(in_layout(x), weight, bias, stride)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), stride)
    assert is_channels_last(result)
    assert (result - expected).abs().max() <= 1e-5
    assert (convolve(in_layout(x), weight, None, stride) - expected + bias.view(-1, 1, 1, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_a_float16_convolution_sums_in_float32(stride):
    """`--vae-precision fp16` on a CPU: the exact sum of the float16 numbers, rounded once."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 32, 4, 7, 6).half(), (torch.randn(16, 32, 3, 3, 3) / 30).half(), torch.ones(16)
    result = convolve(in_layout(x), weight, bias.half(), stride)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), stride)
    assert result.dtype is torch.float16
    assert is_channels_last(result)
    half_a_unit = 2.0**-11 * expected.abs()
    assert ((result.double() - expected).abs() <= half_a_unit + 1e-5).all()


def test_pointwise_convolutions_are_pytorchs():
    """The matrix product gives the numbers of a convolution and keeps the layout."""
    conv, x = nn.Conv3d(8, 5, 1).requires_grad_(False), torch.randn(2, 8, 3, 4, 5)
    result = mix_channels(conv, in_layout(x))
    assert is_channels_last(result)
    assert (result - conv(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_a_single_frame_is_convolved_in_two_dimensions(stride):
    """Images: one 2D convolution with the sum of the taps in time equals the convolution of the padded frames."""
    torch.manual_seed(0)
    layer, x = CausalConv3d(6, 7, stride).requires_grad_(False), torch.randn(1, 6, 1, 8, 6)
    padded = F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
    expected = F.conv3d(padded, layer.conv.weight, layer.conv.bias, stride)
    assert (layer(x) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_the_upsampler_equals_upsampling_and_convolution(factor, frames):
    """Spec section 5: nearest neighbours, the first frame not doubled in time, then the padded convolution."""
    torch.manual_seed(0)
    layer, x = UpsampleCausal3D(5, factor).requires_grad_(False), torch.randn(2, 5, frames, 3, 4)
    doubled = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    if factor[0] == 2:
        doubled = doubled.repeat_interleave(2, 2)[:, :, 1:]
    padded = F.pad(doubled, (1, 1, 1, 1, 2, 0), mode="replicate")
    result = layer(in_layout(x))
    assert is_channels_last(result)
    assert (result - F.conv3d(padded, layer.conv.conv.weight, layer.conv.conv.bias)).abs().max() <= 1e-5


@pytest.mark.parametrize("frames", [1, 3])
def test_no_layer_loses_the_layout(frames):
    """Speed: a tensor in another layout would be copied by every following layer."""
    vae, strays = CausalVAE(NARROW).requires_grad_(False), []

    def watch(name):
        def hook(_module, inputs, output):
            strays.extend(name for x in (inputs[0], output) if x.dim() == 5 and not is_channels_last(x))

        return hook

    for name, module in vae.named_modules():
        if not isinstance(module, nn.GroupNorm | nn.Conv3d):  # the norm of the attention has another layout
            module.register_forward_hook(watch(name))
    vae.decode(torch.randn(1, 16, frames, 6, 5))
    vae.encode(torch.randn(1, 3, 4 * frames - 3, 32, 24))
    assert strays == []
