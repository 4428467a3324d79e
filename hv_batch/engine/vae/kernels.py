"""The performance-critical operations of the VAE: convolutions and the fused operations between them.

GroupNorm, SiLU and the padding of the next convolution are fused and write directly into the padded tensor. There is no
intermediate rounding and no intermediate tensor of full size. On a GPU, two Triton kernels do this
(triton_kernels.py). Otherwise it runs a few frames at a time in float32 scratch memory that fits the cache. PyTorch's
GroupNorm is less accurate: on a GPU it rounds the statistics of half-precision tensors, and on a CPU it sums a whole
group of a channels-last tensor sequentially, which is 2e-3 off at the size of one tile.

Tensors are channels-last in memory. Convolutions then do not have to reorder inputs and outputs, which on a CPU takes a
quarter of a decode. The rest is bound by memory, mainly by newly allocated memory: faulting in a page costs more than
filling it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Stride = tuple[int, int, int]  # frames, height, width
NormSiluPad = Callable[[nn.GroupNorm, Tensor, int], Tensor]

LAYOUT = torch.channels_last_3d

_reused = threading.local()  # .memory: a byte tensor, present only within `reused_memory`

CACHE_BYTES = 8 * 2**20  # scratch memory: fits any last-level cache, and is large enough to keep the calls few


def in_layout(x: Tensor) -> Tensor:
    """Return `x` in channels-last layout; usually `x` itself."""
    return x.contiguous(memory_format=LAYOUT)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride = (1, 1, 1)) -> Tensor:
    """A 3D convolution without padding."""
    if x.device.type == "cpu" and x.dtype is torch.float16:
        # PyTorch's float16 kernel is a hundred times slower. It also sums in float32 and rounds once.
        wide = None if bias is None else bias.float()
        return convolve(x.float(), weight.float(), wide, stride).to(x.dtype)
    if x.device.type == "cpu" and x.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        # Called directly, because PyTorch uses a three times slower kernel for inputs of less than a million elements.
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(in_layout(x), weight, bias, stride)


def mix_channels(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Compute a 1x1x1 convolution as a matrix product."""
    return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)


def pad(x: Tensor, front: int) -> Tensor:
    """Pad x [B, C, T, H, W] by replication: by 1 on every side of a frame, by `front` frames before the first one."""
    return F.pad(x, (1, 1, 1, 1, front, 0), mode="replicate")


def normalise(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Return norm(x), computed in float32 and rounded once to the dtype of `x`; contiguous, channels first."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.group_norm(x.float().contiguous(), norm.num_groups, weight, bias, norm.eps).to(x.dtype)


def norm_silu_pad(norm: nn.GroupNorm, x: Tensor, front: int) -> Tensor:
    """Return pad(SiLU(norm(x)), front), computed in float32 and rounded once to the dtype of `x`.

    The release computes the same: its autocast runs GroupNorm and the following operations in float32 up to the next
    convolution.
    """
    x = in_layout(x)
    if x.is_cuda and (fused := _gpu_kernels(x.device)):
        return fused(norm, x, front)
    batch, channels, frames, height, width = x.shape
    out = _memory_for((batch, channels, frames + front, height + 2, width + 2), x)
    chunks = _chunks(x)
    scratch = torch.empty(chunks[0].shape, dtype=torch.float32, device=x.device, memory_format=LAYOUT)
    scale, shift = _affine(norm, chunks, scratch)
    inner = out[:, :, front:, 1:-1, 1:-1].split(chunks[0].shape[2], dim=2)
    for chunk, target in zip(chunks, inner, strict=True):
        result = torch.mul(chunk, scale, out=scratch[:, :, : chunk.shape[2]]).add_(shift)
        target.copy_(F.silu(result, inplace=True))
    out[:, :, front:, 0] = out[:, :, front:, 1]
    out[:, :, front:, -1] = out[:, :, front:, -2]
    out[:, :, front:, :, 0] = out[:, :, front:, :, 1]  # after the rows, so that the columns include the corners
    out[:, :, front:, :, -1] = out[:, :, front:, :, -2]
    out[:, :, :front] = out[:, :, front : front + 1]
    return out


@cache
def _gpu_kernels(device: torch.device) -> NormSiluPad | None:
    """Return the Triton kernels, or None if Triton or a C compiler is missing. Logs a warning in this case.

    The result is cached, so the warning is logged once per process.
    """
    try:
        from hv_batch.engine.vae.triton_kernels import norm_silu_pad as fused

        norm = nn.GroupNorm(1, 1, device=device)
        fused(norm, in_layout(torch.zeros(1, 1, 1, 2, 2, device=device)), 0)
    except Exception as error:  # noqa: BLE001 - a compiler may raise any error
        logger.warning(
            "Triton cannot build kernels on this machine (%s), so the norms of the VAE run as PyTorch operations and a "
            "decode takes twice as long. Install the package triton and a C compiler.",
            error,
        )
        return None
    return fused


@contextmanager
def reused_memory() -> Iterator[None]:
    """Let all padded tensors of this thread share one buffer. Each must be convolved before the next is created."""
    _reused.memory = torch.empty(0, dtype=torch.uint8)
    try:
        yield
    finally:
        del _reused.memory


def _memory_for(shape: tuple[int, int, int, int, int], x: Tensor) -> Tensor:
    """Return an uninitialised channels-last tensor with the dtype and device of `x`."""
    if x.device.type != "cpu" or not hasattr(_reused, "memory"):  # CUDA's caching allocator reuses memory itself
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)
    num_bytes = prod(shape) * x.dtype.itemsize
    if _reused.memory.numel() < num_bytes:
        _reused.memory = torch.empty(0, dtype=torch.uint8)  # free the old buffer before allocating a larger one
        _reused.memory = torch.empty(num_bytes, dtype=torch.uint8)
    batch, channels, frames, height, width = shape
    memory: Tensor = _reused.memory[:num_bytes]
    return memory.view(x.dtype).view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Split x into views of as many frames as CACHE_BYTES holds in float32."""
    frame_bytes = x[:, :, 0].numel() * 4
    return x.split(max(1, CACHE_BYTES // frame_bytes), dim=2)


def _affine(norm: nn.GroupNorm, chunks: tuple[Tensor, ...], scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of each channel, float32 [B, C, 1, 1, 1], such that norm(x) = x * scale + shift.

    The variance is computed from deviations, not from squares, which would cancel if the mean is far from zero.
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


def _group_mean(norm: nn.GroupNorm, sums_BC: list[Tensor], positions: int) -> Tensor:  # noqa: N803
    """Return the mean over each group, repeated for each of its channels: float64 [B, C, 1, 1, 1].

    `sums_BC` are partial sums over `positions` positions (frames x height x width) in total.
    """
    total = torch.stack(sums_BC).sum(0, dtype=torch.float64).unflatten(1, (norm.num_groups, -1))
    mean = total.sum(-1, keepdim=True) / (positions * total.shape[-1])
    return mean.expand_as(total).flatten(1)[:, :, None, None, None]
