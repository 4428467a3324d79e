"""The VAE's hot operations, and how its tensors lie in memory: convolutions, and all that runs between them.

On a CPU, channels are last in memory. That spares convolutions the reordering of their inputs and outputs: a quarter of
a whole decode, which is otherwise bound by memory, and most of all by fresh memory: to be handed a new page costs more
than to fill it. So GroupNorm, SiLU and the padding of the next convolution are computed together, a few frames at a
time, in scratch memory that stays in the cache, straight into the padded tensor. It is also the accurate way: PyTorch's
own GroupNorm adds up a whole group of a channels-last tensor one value after the other, and is 2e-3 off at the size of
one tile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stride = tuple[int, int, int]  # frames, height, width

_reused = threading.local()  # .memory: one byte tensor, inside `reused_memory` only

CACHE_BYTES = 8 * 2**20  # of scratch at a time: a share of any last-level cache, yet enough to keep calls few


def layout(x: Tensor) -> torch.memory_format:
    """The order in memory that the device of `x` convolves fastest in."""
    return torch.channels_last_3d if x.device.type == "cpu" else torch.contiguous_format


def in_layout(x: Tensor) -> Tensor:
    """`x` itself where it is in its device's layout, as it nearly always is."""
    return x.contiguous(memory_format=layout(x))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride = (1, 1, 1)) -> Tensor:
    """A 3D convolution without padding, in the layout of the device."""
    if x.device.type == "cpu" and x.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        # Called by name: PyTorch gives inputs of less than a million numbers to a kernel three times slower.
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return in_layout(F.conv3d(x, weight, bias, stride))


def mix_channels(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A 1x1x1 convolution; where channels are last, as the matrix product that it is."""
    if layout(x) is not torch.channels_last_3d:
        return conv(x)
    return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)


def pad(x: Tensor, front: int) -> Tensor:
    """[B, C, T, H, W] with its edges repeated: once on every side of a frame, `front` times before the first frame."""
    return F.pad(x, (1, 1, 1, 1, front, 0), mode="replicate")


def norm_silu_pad(norm: nn.GroupNorm, x: Tensor, front: int) -> Tensor:
    """pad(SiLU(norm(x)), front), in the layout of the device."""
    if layout(x) is torch.channels_last_3d:
        return _by_chunk(norm, in_layout(x), front)
    return pad(F.silu(norm(x), inplace=True), front)


@contextmanager
def reused_memory() -> Iterator[None]:
    """Within it, all padded tensors of this thread share their memory: each is convolved before the next is made."""
    _reused.memory = torch.empty(0, dtype=torch.uint8)
    try:
        yield
    finally:
        del _reused.memory


def _memory_for(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if not hasattr(_reused, "memory"):
        return torch.empty(shape, dtype=dtype)
    num_bytes = prod(shape) * dtype.itemsize
    if _reused.memory.numel() < num_bytes:
        _reused.memory = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is asked for
        _reused.memory = torch.empty(num_bytes, dtype=torch.uint8)
    memory: Tensor = _reused.memory[:num_bytes]
    return memory.view(dtype).view(shape)


def _by_chunk(norm: nn.GroupNorm, x: Tensor, front: int) -> Tensor:
    batch, channels, frames, height, width = x.shape
    out = _memory_for((batch, frames + front, height + 2, width + 2, channels), x.dtype)
    chunks = _chunks(x)
    scratch = torch.empty(chunks[0].shape, dtype=torch.float32)
    scale, shift = _affine(norm, chunks, scratch)
    inner = out[:, front:, 1:-1, 1:-1].split(chunks[0].shape[1], dim=1)
    for chunk, place in zip(chunks, inner, strict=True):
        result = torch.mul(chunk, scale, out=scratch[:, : chunk.shape[1]]).add_(shift)
        place.copy_(F.silu(result, inplace=True))
    out[:, front:, 0] = out[:, front:, 1]
    out[:, front:, -1] = out[:, front:, -2]
    out[:, front:, :, 0] = out[:, front:, :, 1]  # after the rows: so the columns bring the corners with them
    out[:, front:, :, -1] = out[:, front:, :, -2]
    out[:, :front] = out[:, front : front + 1]
    return out.permute(0, 4, 1, 2, 3)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Views [B, frames, H, W, C] of a channels-last tensor, of as many frames as the cache takes."""
    frame_bytes = x[:, :, 0].numel() * 4
    return x.permute(0, 2, 3, 4, 1).split(max(1, CACHE_BYTES // frame_bytes), dim=1)


def _affine(norm: nn.GroupNorm, chunks: tuple[Tensor, ...], scratch: Tensor) -> tuple[Tensor, Tensor]:
    """What multiplies and what is added to each channel: float32 [B, 1, 1, 1, C].

    The variance from the deviations, not from the squares: a mean far from zero would leave nothing of the latter.
    """
    places = sum(chunk.shape[1] for chunk in chunks) * chunks[0].shape[2] * chunks[0].shape[3]
    mean = _group_mean(norm, [chunk.float().sum((1, 2, 3)) for chunk in chunks], places)
    mean_32 = mean.float()
    squares = []
    for chunk in chunks:
        deviation = torch.sub(chunk, mean_32, out=scratch[:, : chunk.shape[1]])
        squares.append(deviation.square_().sum((1, 2, 3)))
    scale = (_group_mean(norm, squares, places) + norm.eps).rsqrt() * norm.weight
    return scale.float(), (norm.bias - mean * scale).float()


def _group_mean(norm: nn.GroupNorm, sums_BC: list[Tensor], places: int) -> Tensor:  # noqa: N803
    """The mean over each group from sums over `places` pixels in all, for each of its channels: float64 [B,1,1,1,C]."""
    total = torch.stack(sums_BC).sum(0, dtype=torch.float64).unflatten(1, (norm.num_groups, -1))
    mean = total.sum(-1, keepdim=True) / (places * total.shape[-1])
    return mean.expand_as(total).flatten(1)[:, None, None, None]
