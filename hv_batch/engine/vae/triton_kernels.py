"""GroupNorm, SiLU and padding on a GPU: read once for the statistics, once more to write what is convolved next.

PyTorch's operations, one after the other, would move the same tensor through memory a dozen times, which took half of a
decode. Deterministic: no sum depends on which thread comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

TILE = 4096  # values that a program holds at a time
MOST_CHANNELS = 128  # of them; the rest are places
PROGRAMS = 2048  # about, for the statistics: some for every multiprocessor of any GPU


@triton.jit
def _sum_up(
    x: tl.tensor,  # [B, P, C], C contiguous
    parts: tl.tensor,  # float32 [B, splits, 3, C]: a pivot near the mean, and sums of deviations from it and of squares
    places: tl.tensor,
    channels: tl.tensor,
    span: tl.tensor,  # places of a program
    PLACES: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
) -> None:
    split, splits, batch = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    begin = split * span
    end = tl.minimum(begin + span, places)
    x += batch * places * channels
    place = begin + tl.arange(0, PLACES)
    mask = (place < end)[:, None] & is_channel[None, :]
    first = tl.load(x + place[:, None].to(tl.int64) * channels + channel[None, :], mask=mask, other=0.0)
    pivot = tl.sum(first.to(tl.float32), 0) / tl.minimum(end - begin, PLACES)
    sums = tl.zeros((PLACES, CHANNELS), tl.float32)
    squares = tl.zeros((PLACES, CHANNELS), tl.float32)
    for start in range(begin, end, PLACES):
        place = start + tl.arange(0, PLACES)
        mask = (place < end)[:, None] & is_channel[None, :]
        value = tl.load(x + place[:, None].to(tl.int64) * channels + channel[None, :], mask=mask, other=0.0)
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
    PLACES: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
) -> None:
    frame_out = tl.program_id(2).to(tl.int64)  # of all of the batch
    batch, t = frame_out // (frames + front), tl.maximum(frame_out % (frames + front) - front, 0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    places = (height + 2) * (width + 2)
    mask = (place < places)[:, None] & is_channel[None, :]
    y = tl.minimum(tl.maximum(place // (width + 2) - 1, 0), height - 1)
    column = tl.minimum(tl.maximum(place % (width + 2) - 1, 0), width - 1)
    source = ((batch * frames + t) * height * width + y * width + column) * channels
    value = tl.load(x + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    a = tl.load(scale + batch * channels + channel, mask=is_channel, other=0.0)
    b = tl.load(shift + batch * channels + channel, mask=is_channel, other=0.0)
    normed = value * a[None, :] + b[None, :]
    target = (frame_out * places + place) * channels
    result = (normed * tl.sigmoid(normed)).to(out.dtype.element_ty)
    tl.store(out + target[:, None] + channel[None, :], result, mask=mask)


def norm_silu_pad(norm: nn.GroupNorm, x: Tensor, front: int) -> Tensor:
    """As `vae_kernels.norm_silu_pad`, of a channels-last [B, C, T, H, W] on a GPU."""
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, frames + front, height + 2, width + 2)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    scale, shift = _affine(norm, x)
    wide = min(triton.next_power_of_2(channels), MOST_CHANNELS)
    places = TILE // 2 // wide
    grid = (triton.cdiv(shape[3] * shape[4], places), triton.cdiv(channels, wide), batch * shape[2])
    _write[grid](x, scale, shift, out, channels, frames, height, width, front, places, wide)
    return out


def _affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """What multiplies and what is added to each channel: float32 [B, C]. Partial sums are put together in float64."""
    batch, channels = x.shape[:2]
    places = x[0, 0].numel()
    wide = min(triton.next_power_of_2(channels), MOST_CHANNELS)
    step = TILE // wide
    blocks = batch * triton.cdiv(channels, wide)
    span = triton.cdiv(triton.cdiv(places, triton.cdiv(PROGRAMS, blocks)), step) * step
    splits = triton.cdiv(places, span)
    parts = torch.empty((batch, splits, 3, channels), dtype=torch.float32, device=x.device)
    grid = (splits, triton.cdiv(channels, wide), batch)
    _sum_up[grid](x, parts, places, channels, span, step, wide, num_warps=8)

    counts = torch.full((splits, 1), span, dtype=torch.float64, device=x.device)
    counts[-1] = places - span * (splits - 1)
    pivots, sums, squares = parts.double().unbind(2)  # [B, splits, C]
    mean = _group_mean(norm, counts * pivots + sums, places)
    off = pivots - mean[:, None]
    variance = _group_mean(norm, squares + 2 * sums * off + counts * off.square(), places)
    scale = (variance + norm.eps).rsqrt() * norm.weight
    return scale.float(), (norm.bias - mean * scale).float()


def _group_mean(norm: nn.GroupNorm, sums: Tensor, places: int) -> Tensor:
    """The mean over each group, for each of its channels, [B, C], from sums [B, splits, C] over `places` in all."""
    grouped = sums.sum(1).unflatten(1, (norm.num_groups, -1))
    mean = grouped.sum(-1, keepdim=True) / (places * grouped.shape[-1])
    return mean.expand_as(grouped).flatten(1)
