"""The modules of the causal 3D VAE. Their names are those of the released checkpoint.

Every `x` is [batch, channels, frames, height, width]. Convolutions and attention are causal in time: a convolution pads
only before the first frame, and attention covers a token's own frame and earlier frames. Padding replicates the edge.
"""

from __future__ import annotations

from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hv_batch.engine.vae.kernels import LAYOUT, Stride, convolve, mix_channels, norm_silu_pad, normalise, pad

NORM_EPS = 1e-6  # of every GroupNorm of the released model
CORNERS = tuple(product((0, 1), repeat=2))  # (row parity, column parity) of the upsampled outputs


class CausalConv3d(nn.Module):
    """A causal 3x3x3 convolution. It keeps the shape, divided by `stride`."""

    def __init__(self, in_channels: int, out_channels: int, stride: Stride = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride)
        self.stride = stride

    def forward(self, x: Tensor, norm: nn.GroupNorm | None = None) -> Tensor:
        """Return the convolution of `x`, or of SiLU(norm(x)) if `norm` is given."""
        weight, front = self.conv.weight, 2
        if x.shape[2] == 1:
            weight, front = _sum_taps_in_time(weight).to(x.dtype), 0
        padded = pad(x, front) if norm is None else norm_silu_pad(norm, x, front)
        return convolve(padded, weight, self.conv.bias, self.stride)


class PointwiseConv3d(nn.Module):
    """A 1x1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return mix_channels(self.conv, x)


class UpsampleCausal3D(nn.Module):
    """Nearest-neighbour upsampling by `factor`, then a causal 3x3x3 convolution.

    The first frame is doubled in height and width only: T frames become 2T - 1.

    Along a doubled axis, neighbouring inputs are equal in pairs, so the 3 taps of the kernel read only 2 different
    inputs. Summing the taps that read the same input gives one 2-tap kernel for the even outputs and one for the odd
    outputs. The result is equal up to rounding, with 8 multiplications instead of 27 and without an upsampled copy of
    the input. The four kernels over height and width run as one convolution with four times the channels, which reads
    its input once; each kernel computes one unused row and one unused column.
    """

    def __init__(self, channels: int, factor: Stride) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        kernels, front = self._kernels_in_time(frames)
        x = pad(x, front)
        doubled = (batch, channels, len(kernels) * (frames - 1) + 1, 2 * height, 2 * width)
        out = torch.empty(doubled, dtype=x.dtype, device=x.device, memory_format=LAYOUT)
        bias = self.conv.conv.bias
        for t, kernel in enumerate(kernels):
            weight = torch.cat([_merge_taps(_merge_taps(kernel, 3, h), 4, w) for h, w in CORNERS])
            four = convolve(x[:, :, t:], weight.to(x.dtype), None if bias is None else bias.repeat(len(CORNERS)))
            for (h, w), one in zip(CORNERS, four.chunk(len(CORNERS), dim=1), strict=True):
                out[:, :, t :: len(kernels), h::2, w::2] = one[..., h : h + height, w : w + width]
        return out

    def _kernels_in_time(self, frames: int) -> tuple[list[Tensor], int]:
        """Return the float32 kernels in time, and the number of frames to pad in front.

        There is one kernel for all output frames, or one for the even and one for the odd output frames.
        """
        weight = self.conv.conv.weight.float()
        if frames == 1:
            return [_sum_taps_in_time(weight)], 0
        if self.factor[0] == 1:
            return [weight], 2
        # Outputs 2k - 1 and 2k both read inputs k - 1 and k, so one frame of padding is sufficient.
        return [_merge_taps(weight, 2, 0), _merge_taps(weight, 2, 1)], 1


def _sum_taps_in_time(weight: Tensor) -> Tensor:
    """Return the float32 kernel for a single frame.

    All taps in time read the same frame, so their sum saves two thirds of the multiplications.
    """
    return weight.float().sum(2, keepdim=True)


def _merge_taps(weight: Tensor, dim: int, parity: int) -> Tensor:
    """Return the 2-tap kernel along `dim` for the even (parity 0) or odd (parity 1) outputs of a doubled axis."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last) if parity == 0 else (first + middle, last), dim)


class DownsampleCausal3D(nn.Module):
    """A causal 3x3x3 convolution with a stride."""

    def __init__(self, channels: int, stride: Stride) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ResnetBlockCausal3D(nn.Module):
    """Two times GroupNorm, SiLU and causal convolution; a 1x1x1 convolution on the shortcut if the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = PointwiseConv3d(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(self.conv1(x, self.norm1), self.norm2)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden.add_(shortcut)


class FrameCausalAttention(nn.Module):
    """Single-head self-attention with a residual. A token attends to its own frame and all earlier frames.

    Computed frame by frame over the keys of the frames so far. This needs no mask, which would have (T*H*W)^2 entries
    (1.2 GB in fp32 for one tile of the release), and half the multiplications.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        _, _, frames, height, width = x.shape
        tokens = normalise(self.group_norm, x).flatten(2).transpose(1, 2)
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))  # [B, 1 head, L, C]
        in_frame = height * width
        by_frame = [
            F.scaled_dot_product_attention(q[:, :, end - in_frame : end], k[:, :, :end], v[:, :, :end])
            for end in range(in_frame, (frames + 1) * in_frame, in_frame)
        ]
        attended = self.to_out[0](torch.cat(by_frame, dim=2).squeeze(1))
        return attended.transpose(1, 2).unflatten(2, (frames, height, width)) + x


class MidBlock(nn.Module):
    """Resnet, attention, resnet, at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlockCausal3D(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nn.Module):
    """`layers` resnets, followed by a downsampler unless `stride` is None."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, stride: Stride | None) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.downsamplers = nn.ModuleList([] if stride is None else [DownsampleCausal3D(out_channels, stride)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """`layers` resnets, followed by an upsampler unless `factor` is None."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, factor: Stride | None) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.upsamplers = nn.ModuleList([] if factor is None else [UpsampleCausal3D(out_channels, factor)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def _resnets(in_channels: int, out_channels: int, layers: int, groups: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * layers
    return nn.ModuleList([ResnetBlockCausal3D(*pair, groups) for pair in pairwise(widths)])
