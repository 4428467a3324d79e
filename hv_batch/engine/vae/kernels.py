"""The VAE's hot operations, and how its tensors lie in memory: convolutions, and all that runs between them.

GroupNorm, SiLU and the padding of the next convolution are computed together, straight into the padded tensor: so
nothing is rounded, and no tensor of full size made, in between. On a GPU two kernels do it (vae_triton.py); elsewhere
it goes a few frames at a time, in float32 scratch memory that stays in the cache. PyTorch's own GroupNorm would round
the statistics of half-precision tensors on a GPU, and on a CPU adds up a whole group of a channels-last tensor one
value after the other, 2e-3 off at the size of one tile.

Channels are last in memory. That spares convolutions the reordering of their inputs and outputs: on a CPU a quarter of
a whole decode, which is otherwise bound by memory, and most of all by fresh memory: to be handed a new page costs more
than to fill it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stride = tuple[int, int, int]  # frames, height, width
NormSiluPad = Callable[[nn.GroupNorm, Tensor, int], Tensor]

LAYOUT = torch.channels_last_3d

_reused = threading.local()  # .memory: one byte tensor, inside `reused_memory` only

CACHE_BYTES = 8 * 2**20  # of scratch at a time: a share of any last-level cache, yet enough to keep calls few


def in_layout(x: Tensor) -> Tensor:
    """`x` with channels last: itself, nearly always."""
    return x.contiguous(memory_format=LAYOUT)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride = (1, 1, 1)) -> Tensor:
    """A 3D convolution without padding."""
    if x.device.type == "cpu" and x.dtype is torch.float16:
        # Of float16, PyTorch has a kernel a hundred times slower, which sums in float32 and rounds once as well.
        wide = None if bias is None else bias.float()
        return convolve(x.float(), weight.float(), wide, stride).to(x.dtype)
    if x.device.type == "cpu" and x.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        # Called by name: PyTorch gives inputs of less than a million numbers to a kernel three times slower.
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(in_layout(x), weight, bias, stride)


def mix_channels(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A 1x1x1 convolution, as the matrix product that it is."""
    return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)


def pad(x: Tensor, front: int) -> Tensor:
    """[B, C, T, H, W] with its edges repeated: once on every side of a frame, `front` times before the first frame."""
    return F.pad(x, (1, 1, 1, 1, front, 0), mode="replicate")


def normalise(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x), channels first in memory; in float32, rounded once to the dtype of `x`."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.group_norm(x.float().contiguous(), norm.num_groups, weight, bias, norm.eps).to(x.dtype)


def norm_silu_pad(norm: nn.GroupNorm, x: Tensor, front: int) -> Tensor:
    """pad(SiLU(norm(x)), front): computed in float32, rounded once to the dtype of `x`.

    So does the release, whose autocast keeps GroupNorm and all that follows it in float32 until the next convolution.
    """
    x = in_layout(x)
    if x.is_cuda and (on_gpu := _gpu_kernels(x.device)):
        return on_gpu(norm, x, front)
    batch, channels, frames, height, width = x.shape
    out = _memory_for((batch, channels, frames + front, height + 2, width + 2), x)
    chunks = _chunks(x)
    scratch = torch.empty(chunks[0].shape, dtype=torch.float32, device=x.device, memory_format=LAYOUT)
    scale, shift = _affine(norm, chunks, scratch)
    inner = out[:, :, front:, 1:-1, 1:-1].split(chunks[0].shape[2], dim=2)
    for chunk, place in zip(chunks, inner, strict=True):
        result = torch.mul(chunk, scale, out=scratch[:, :, : chunk.shape[2]]).add_(shift)
        place.copy_(F.silu(result, inplace=True))
    out[:, :, front:, 0] = out[:, :, front:, 1]
    out[:, :, front:, -1] = out[:, :, front:, -2]
    out[:, :, front:, :, 0] = out[:, :, front:, :, 1]  # after the rows: so the columns bring the corners with them
    out[:, :, front:, :, -1] = out[:, :, front:, :, -2]
    out[:, :, :front] = out[:, :, front : front + 1]
    return out


@cache
def _gpu_kernels(device: torch.device) -> NormSiluPad | None:
    """None, told once, where there is no Triton or no C compiler, without which it starts no kernel."""
    try:
        from hv_batch.engine.vae.triton_kernels import norm_silu_pad as fused

        norm = nn.GroupNorm(1, 1, device=device)
        fused(norm, in_layout(torch.zeros(1, 1, 1, 2, 2, device=device)), 0)
    except Exception as error:  # noqa: BLE001 - whatever a compiler may raise
        warnings.warn(
            "A decode takes twice as long as it could: the VAE's norms run as PyTorch operations, because Triton "
            f"can build no kernel here ({error}). It needs its package, triton, and a C compiler.",
            stacklevel=2,
        )
        return None
    return fused


@contextmanager
def reused_memory() -> Iterator[None]:
    """Within it, all padded tensors of this thread share their memory: each is convolved before the next is made."""
    _reused.memory = torch.empty(0, dtype=torch.uint8)
    try:
        yield
    finally:
        del _reused.memory


def _memory_for(shape: tuple[int, int, int, int, int], x: Tensor) -> Tensor:
    """An uninitialised tensor in the dtype and on the device of `x`."""
    if x.device.type != "cpu" or not hasattr(_reused, "memory"):  # CUDA's allocator hands out what was used before
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)
    num_bytes = prod(shape) * x.dtype.itemsize
    if _reused.memory.numel() < num_bytes:
        _reused.memory = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is asked for
        _reused.memory = torch.empty(num_bytes, dtype=torch.uint8)
    batch, channels, frames, height, width = shape
    memory: Tensor = _reused.memory[:num_bytes]
    return memory.view(x.dtype).view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Views of as many frames as the cache takes in float32."""
    frame_bytes = x[:, :, 0].numel() * 4
    return x.split(max(1, CACHE_BYTES // frame_bytes), dim=2)


def _affine(norm: nn.GroupNorm, chunks: tuple[Tensor, ...], scratch: Tensor) -> tuple[Tensor, Tensor]:
    """What multiplies and what is added to each channel: float32 [B, C, 1, 1, 1].

    The variance from the deviations, not from the squares: a mean far from zero would leave nothing of the latter.
    """
    frames, height, width = sum(chunk.shape[2] for chunk in chunks), *chunks[0].shape[3:]
    mean = _group_mean(norm, [chunk.sum((2, 3, 4), dtype=torch.float32) for chunk in chunks], frames * height * width)
    mean_32 = mean.float()
    squares = []
    for chunk in chunks:
        deviation = torch.sub(chunk, mean_32, out=scratch[:, :, : chunk.shape[2]])
        squares.append(deviation.square_().sum((2, 3, 4)))
    scale = (_group_mean(norm, squares, frames * height * width) + norm.eps).rsqrt() * norm.weight[:, None, None, None]
    return scale.float(), (norm.bias[:, None, None, None] - mean * scale).float()


def _group_mean(norm: nn.GroupNorm, sums_BC: list[Tensor], places: int) -> Tensor:  # noqa: N803
    """The mean over each group from sums over `places` pixels in all, for each of its channels: float64 [B,C,1,1,1]."""
    total = torch.stack(sums_BC).sum(0, dtype=torch.float64).unflatten(1, (norm.num_groups, -1))
    mean = total.sum(-1, keepdim=True) / (places * total.shape[-1])
    return mean.expand_as(total).flatten(1)[:, :, None, None, None]
