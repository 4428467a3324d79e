"""Fused GroupNorm, SiLU and padding on a GPU, as two Triton kernels.

The first kernel reads the tensor for the statistics. The second reads it again and writes the padded input of the next
convolution. Separate PyTorch operations read and write the tensor a dozen times, which took half of a decode. The
kernels are deterministic: no sum depends on the order of threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

TILE = 4096  # elements that a program holds at a time: channels x positions
MAX_CHANNELS = 128  # channels of a tile
PROGRAMS = 2048  # approximate number of programs of the statistics: several per multiprocessor of any GPU


@triton.jit
def _partial_sums(
    x: tl.tensor,  # [B, P, C], C contiguous; P positions
    parts: tl.tensor,  # float32 [B, splits, 3, C]: a pivot near the mean, the sums of deviations from it and of squares
    positions: tl.tensor,
    channels: tl.tensor,
    span: tl.tensor,  # positions of a program
    POSITIONS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
) -> None:
    split, splits, batch = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    begin = split * span
    end = tl.minimum(begin + span, positions)
    x += batch * positions * channels
    position = begin + tl.arange(0, POSITIONS)
    mask = (position < end)[:, None] & is_channel[None, :]
    first = tl.load(x + position[:, None].to(tl.int64) * channels + channel[None, :], mask=mask, other=0.0)
    pivot = tl.sum(first.to(tl.float32), 0) / tl.minimum(end - begin, POSITIONS)
    sums = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    squares = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for start in range(begin, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        mask = (position < end)[:, None] & is_channel[None, :]
        value = tl.load(x + position[:, None].to(tl.int64) * channels + channel[None, :], mask=mask, other=0.0)
        deviation = tl.where(mask, value.to(tl.float32) - pivot[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    parts += (batch * splits + split) * 3 * channels + channel
    tl.store(parts, pivot, mask=is_channel)
    tl.store(parts + channels, tl.sum(sums, 0), mask=is_channel)
    tl.store(parts + 2 * channels, tl.sum(squares, 0), mask=is_channel)


@triton.jit
def _write(
    x: tl.tensor,  # [B, T, H, W, C]
    scale: tl.tensor,  # float32 [B, C]
    shift: tl.tensor,  # float32 [B, C]
    out: tl.tensor,  # [B, T + front, H + 2, W + 2, C]
    channels: tl.tensor,
    frames: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    front: tl.tensor,
    POSITIONS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
) -> None:
    frame_out = tl.program_id(2).to(tl.int64)  # counted over the batch
    batch, t = frame_out // (frames + front), tl.maximum(frame_out % (frames + front) - front, 0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    positions = (height + 2) * (width + 2)
    mask = (position < positions)[:, None] & is_channel[None, :]
    y = tl.minimum(tl.maximum(position // (width + 2) - 1, 0), height - 1)
    column = tl.minimum(tl.maximum(position % (width + 2) - 1, 0), width - 1)
    source = ((batch * frames + t) * height * width + y * width + column) * channels
    value = tl.load(x + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    a = tl.load(scale + batch * channels + channel, mask=is_channel, other=0.0)
    b = tl.load(shift + batch * channels + channel, mask=is_channel, other=0.0)
    normed = value * a[None, :] + b[None, :]
    target = (frame_out * positions + position) * channels
    result = (normed * tl.sigmoid(normed)).to(out.dtype.element_ty)
    tl.store(out + target[:, None] + channel[None, :], result, mask=mask)


def norm_silu_pad(norm: nn.GroupNorm, x: Tensor, front: int) -> Tensor:
    """Same as `kernels.norm_silu_pad` for a channels-last [B, C, T, H, W] on a GPU."""
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, frames + front, height + 2, width + 2)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    scale, shift = _affine(norm, x)
    wide = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    positions = TILE // 2 // wide
    grid = (triton.cdiv(shape[3] * shape[4], positions), triton.cdiv(channels, wide), batch * shape[2])
    _write[grid](x, scale, shift, out, channels, frames, height, width, front, positions, wide)
    return out


def _affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of each channel, float32 [B, C]. The partial sums are combined in float64."""
    batch, channels = x.shape[:2]
    positions = x[0, 0].numel()
    wide = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    step = TILE // wide
    blocks = batch * triton.cdiv(channels, wide)
    span = triton.cdiv(triton.cdiv(positions, triton.cdiv(PROGRAMS, blocks)), step) * step
    splits = triton.cdiv(positions, span)
    parts = torch.empty((batch, splits, 3, channels), dtype=torch.float32, device=x.device)
    grid = (splits, triton.cdiv(channels, wide), batch)
    _partial_sums[grid](x, parts, positions, channels, span, step, wide, num_warps=8)

    counts = torch.full((splits, 1), span, dtype=torch.float64, device=x.device)
    counts[-1] = positions - span * (splits - 1)
    pivots, sums, squares = parts.double().unbind(2)  # [B, splits, C]
    mean = _group_mean(norm, counts * pivots + sums, positions)
    off = pivots - mean[:, None]
    variance = _group_mean(norm, squares + 2 * sums * off + counts * off.square(), positions)
    scale = (variance + norm.eps).rsqrt() * norm.weight
    return scale.float(), (norm.bias - mean * scale).float()


def _group_mean(norm: nn.GroupNorm, sums: Tensor, positions: int) -> Tensor:
    """Return the mean over each group, repeated for each of its channels: [B, C].

    `sums` [B, splits, C] are partial sums over `positions` positions in total.
    """
    grouped = sums.sum(1).unflatten(1, (norm.num_groups, -1))
    mean = grouped.sum(-1, keepdim=True) / (positions * grouped.shape[-1])
    return mean.expand_as(grouped).flatten(1)
