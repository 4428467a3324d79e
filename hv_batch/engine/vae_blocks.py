"""The parts of the causal 3D VAE (spec section 5), named as the released checkpoint names them.

Every `x` is [batch, channels, frames, height, width]. Convolutions and attention never look ahead in time: a
convolution pads only in front of the first frame, attention reaches the own frame and earlier ones. Padding replicates
the edge.
"""

from __future__ import annotations

from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of every GroupNorm of the released model

Stride = tuple[int, int, int]  # frames, height, width


class CausalConv3d(nn.Module):
    """A convolution of odd kernel size k that keeps the shape (divided by `stride`) and never reads later frames."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: Stride = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)
        side = kernel_size // 2
        self.padding = (side, side, side, side, kernel_size - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):  # a 1x1x1 kernel needs no padded copy
            x = F.pad(x, self.padding, mode="replicate")
        return self.conv(x)


class UpsampleCausal3D(nn.Module):
    """Nearest-neighbour upsampling by `factor`, then a causal 3x3x3 convolution.

    The first frame is doubled in height and width only: T frames become 2T - 1.

    Doubled neighbours are equal, so along a doubled axis the 3 taps of the kernel meet only 2 different inputs. Adding
    up the taps that meet the same input gives one 2-tap kernel for the even and one for the odd outputs: the same
    numbers up to rounding, with 8 multiplications where the plain way needs 27, and no upsampled copy of the input.
    """

    def __init__(self, channels: int, factor: Stride) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        doubles_time = self.factor[0] == 2
        # Doubled in time, outputs 2k - 1 and 2k both see inputs k - 1 and k: one frame in front is enough.
        x = F.pad(x, (1, 1, 1, 1, 1 if doubles_time else 2, 0), mode="replicate")
        out_frames = 2 * frames - 1 if doubles_time else frames
        out = x.new_empty(batch, channels, out_frames, 2 * height, 2 * width)
        weight = self.conv.conv.weight.float()
        for t, h, w in product((0, 1) if doubles_time and frames > 1 else (0,), (0, 1), (0, 1)):
            taps = _merge_taps(_merge_taps(weight, 3, h), 4, w)
            taps = _merge_taps(taps, 2, t) if doubles_time else taps
            window = x[:, :, t:, h : h + height + 1, w : w + width + 1]
            out[:, :, t :: self.factor[0], h::2, w::2] = F.conv3d(window, taps.to(x.dtype), self.conv.conv.bias)
        return out


def _merge_taps(weight: Tensor, dim: int, parity: int) -> Tensor:
    """The 2 taps along `dim` that the even (0) or odd (1) outputs of a doubled axis see."""
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
    """Twice GroupNorm, SiLU, causal convolution; a 1x1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(norm_silu(self.norm1, x))
        hidden = self.conv2(norm_silu(self.norm2, hidden))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden.add_(shortcut)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU(norm(x)); in place on the norm's fresh output, which halves the memory these two touch."""
    return F.silu(norm(x), inplace=True)


class FrameCausalAttention(nn.Module):
    """Single-head self-attention, with a residual: a token sees its own frame and all earlier ones.

    Frame by frame, over the keys of the frames so far: no mask, which would have the square of T*H*W entries (1.2 GB in
    fp32 for one released tile), and half the multiplications.
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
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
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
    """`layers` resnets, then a downsampler unless `stride` is None."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, stride: Stride | None) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.downsamplers = nn.ModuleList([] if stride is None else [DownsampleCausal3D(out_channels, stride)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """`layers` resnets, then an upsampler unless `factor` is None."""

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
