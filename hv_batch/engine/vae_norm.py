"""GroupNorm, SiLU and the padding of the convolution that follows, in as few passes over memory as the device allows.

Away from the convolutions, a decode on a CPU is bound by memory, and most of all by fresh memory: to be handed a new
page costs more than to fill it. So there the three are computed frame by frame, in a scratch frame that stays in the
cache, straight into the padded tensor. It is also the accurate way: PyTorch's own GroupNorm sums a whole group of a
channels-last tensor up one value after the other, and is 2e-3 off at the size of one tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layout(x: Tensor) -> torch.memory_format:
    """The order in memory that the device of `x` convolves fastest in.

    Channels last spares CPU convolutions the reordering of their inputs and outputs, a quarter of a whole decode.
    """
    return torch.channels_last_3d if x.device.type == "cpu" else torch.contiguous_format


def in_layout(x: Tensor) -> Tensor:
    """`x` itself where it is in its device's layout, as it nearly always is."""
    return x.contiguous(memory_format=layout(x))


def pad(x: Tensor, front: int) -> Tensor:
    """[B, C, T, H, W] with its edges repeated: once on every side of a frame, `front` times before the first frame."""
    return F.pad(x, (1, 1, 1, 1, front, 0), mode="replicate")


def norm_silu_pad(norm: nn.GroupNorm, x: Tensor, front: int) -> Tensor:
    """pad(SiLU(norm(x)), front), in the layout of the device."""
    if layout(x) is torch.channels_last_3d:
        return _by_frame(norm, in_layout(x), front)
    return pad(F.silu(norm(x), inplace=True), front)


def _by_frame(norm: nn.GroupNorm, x: Tensor, front: int) -> Tensor:
    batch, channels, frames, height, width = x.shape
    out = x.new_empty(batch, frames + front, height + 2, width + 2, channels)
    scratch = torch.empty((batch, height, width, channels), dtype=torch.float32)
    x_TBHWC = x.permute(2, 0, 3, 4, 1)  # noqa: N806
    scale, shift = _affine(norm, x_TBHWC, scratch)
    for frame, padded in zip(x_TBHWC, out[:, front:].unbind(1), strict=True):
        torch.mul(frame, scale, out=scratch).add_(shift)
        padded[:, 1:-1, 1:-1] = F.silu(scratch, inplace=True)
        padded[:, 0] = padded[:, 1]
        padded[:, -1] = padded[:, -2]
        padded[:, :, 0] = padded[:, :, 1]  # after the rows: so the columns bring the corners with them
        padded[:, :, -1] = padded[:, :, -2]
    out[:, :front] = out[:, front : front + 1]
    return out.permute(0, 4, 1, 2, 3)


def _affine(norm: nn.GroupNorm, x_TBHWC: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
    """What multiplies and what is added to each channel: float32 [B, 1, 1, C].

    The variance from the deviations, not from the squares: a mean far from zero would leave nothing of the latter.
    """
    mean = _group_mean(norm, x_TBHWC, [frame.float().sum((1, 2)) for frame in x_TBHWC])
    mean_32 = mean.float()
    squares = []
    for frame in x_TBHWC:
        torch.sub(frame, mean_32, out=scratch)
        squares.append(torch.mul(scratch, scratch, out=scratch).sum((1, 2)))
    scale = (_group_mean(norm, x_TBHWC, squares) + norm.eps).rsqrt() * norm.weight
    return scale.float(), (norm.bias - mean * scale).float()


def _group_mean(norm: nn.GroupNorm, x_TBHWC: Tensor, sums_BC: list[Tensor]) -> Tensor:  # noqa: N803
    """The mean over each group from the sums over each frame, for every channel of the group: float64 [B, 1, 1, C]."""
    frames, batch, height, width, channels = x_TBHWC.shape
    total = torch.stack(sums_BC).sum(0, dtype=torch.float64).unflatten(1, (norm.num_groups, -1))
    mean = total.sum(-1, keepdim=True) / (frames * height * width * (channels // norm.num_groups))
    return mean.expand_as(total).reshape(batch, 1, 1, channels)
