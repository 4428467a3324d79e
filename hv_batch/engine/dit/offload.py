"""Offloading: the DiT's blocks stay on the host and are copied to the device while the previous block computes.

    host      [ block 0 | block 1 | block 2 | ... ]      pinned memory, or the pages of the checkpoint file
    device    [ buffer A ] [ buffer B ]                  each as large as the largest block

    compute stream   0 in A | 1 in B | 2 in A | ...
    copy stream           1 -> B | 2 -> A | 3 -> B | ...

A copy starts after the block that used its buffer has been computed. A block starts after its copy is complete. CUDA
events between the two streams enforce both, so the host does not wait. The first block follows the last one, for the
next step. Offloading changes neither the arithmetic nor the communication, so the bits are equal on one rank and in a
group.

A copy is queued after the kernels of the previous block. A copy from memory that is not pinned blocks the host thread,
and therefore overlaps with computation as well.

On a CPU the same code runs without streams: a copy is complete when the call returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hv_batch.engine.dit.model import HYVideoDiT

# Bytes. Tensors in a buffer are aligned like those of the CUDA allocator, as kernels expect.
ALIGNMENT = 512

# PyTorch rounds a pinned allocation up to a power of two. For 25 GB of separate tensors this wastes 10 GB, so tensors
# share arenas whose size is a power of two.
ARENA_BYTES = 2**30


def offload_blocks(model: HYVideoDiT, device: torch.device, *, pinned: bool) -> BlockStreamer:
    """Move a model that was loaded on the CPU to `device`, except its blocks, which are streamed from now on.

    `pinned` packs the weights of the blocks into page-locked memory of this process, from which a GPU copies
    asynchronously. Without it the weights stay in place: if they were loaded in the dtype of their file, in the pages
    of the file, which the ranks of a node share. Quantisation, which replaces the modules of the blocks, must be
    applied before.
    """
    streamed = [*model.double_blocks, *model.single_blocks]
    for child in model.children():
        if child is not model.double_blocks and child is not model.single_blocks:
            child.to(device)
    if pinned:
        _pack((tensor for block in streamed for tensor in _tensors(block).values()), device.type == "cuda")
    streamer = BlockStreamer(streamed, device)
    blocks = [StreamedBlock(block, streamer, index) for index, block in enumerate(streamed)]
    depth = len(model.double_blocks)
    model.double_blocks, model.single_blocks = nn.ModuleList(blocks[:depth]), nn.ModuleList(blocks[depth:])
    return streamer


class StreamedBlock(nn.Module):
    """A block that computes with the device copy of its weights."""

    def __init__(self, block: nn.Module, streamer: BlockStreamer, index: int) -> None:
        super().__init__()
        self.block = block
        self._streamer = streamer
        self._index = index

    def forward(self, *args: Any) -> Any:
        with self._streamer.resident(self._index) as weights:
            return functional_call(self.block, weights, args, tie_weights=False)


class BlockStreamer:
    """Copies the weights of `blocks` in cyclic order into two buffers on `device`."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._host = [_tensors(block) for block in blocks]
        size = max(sum(map(_aligned_bytes, tensors.values())) for tensors in self._host)
        self._slots = tuple(_Slot(size, device) for _ in range(2))
        self._next = 0  # the slot for the next copy, which is not in use
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def device_bytes(self) -> int:
        """Device memory of the blocks' weights, in bytes: the two buffers."""
        return sum(slot.memory.nbytes for slot in self._slots)

    @contextmanager
    def resident(self, index: int) -> Iterator[dict[str, Tensor]]:
        """Yield the weights of block `index` on the device, by name. They are valid within the context only.

        On exit, the copy of the next block starts. Blocks may be requested in another order, but then the copy does not
        overlap with computation.
        """
        slot = self._find(index) or self._fetch(index)
        slot.await_copy()
        try:
            yield slot.views
        finally:  # also after an error, because queued kernels of this block may still read the buffer
            slot.release()
        following = (index + 1) % len(self._host)
        if self._find(following) is None:
            self._fetch(following)

    def forget(self) -> None:
        """Drop the device copies, because weights on the host have changed. Must not be called within `resident`."""
        for slot in self._slots:
            slot.holds = None

    def _find(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == index), None)

    def _fetch(self, index: int) -> _Slot:
        slot = self._slots[self._next]
        self._next = 1 - self._next
        slot.fill(index, self._host[index], self._copy_stream)
        return slot


class _Slot:
    """One buffer, the block it holds, and the events that order copies and computation (None without streams)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.views: dict[str, Tensor] = {}
        streams = device.type == "cuda"
        self._copied = torch.cuda.Event() if streams else None
        self._released = torch.cuda.Event() if streams else None
        self.release()  # kernels queued before this memory was freed and reused may still read it

    def fill(self, index: int, host: dict[str, Tensor], stream: torch.cuda.Stream | None) -> None:
        self.holds, self.views = index, _carve(self.memory, host)
        if stream is None or self._released is None or self._copied is None:
            _copy(host, self.views)
            return
        with torch.cuda.stream(stream):
            stream.wait_event(self._released)
            _copy(host, self.views)
            self._copied.record(stream)

    def await_copy(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self._copied)

    def release(self) -> None:
        if self._released is not None:
            self._released.record(torch.cuda.current_stream(self.memory.device))


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor, non_blocking=True)


def _carve(memory: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return views of `memory`, one after the other, with the shapes and dtypes of `like`."""
    views, start = {}, 0
    for name, tensor in like.items():
        views[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _aligned_bytes(tensor)
    return views


@torch.no_grad()
def _pack(tensors: Iterable[Tensor], pin_memory: bool) -> None:
    """Move the data of CPU tensors into arenas, one by one. The old memory of a tensor is freed after its copy."""
    remaining = list(tensors)
    while remaining:
        total = sum(map(_aligned_bytes, remaining))
        # The last arena is only as large as its content, rounded up to a power of two as PyTorch does.
        size = max(min(ARENA_BYTES, 1 << (total - 1).bit_length()), _aligned_bytes(remaining[0]))
        arena = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
        start = 0
        while remaining and start + _aligned_bytes(remaining[0]) <= size:
            tensor = remaining.pop(0)
            packed = arena[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += _aligned_bytes(tensor)
            tensor.data = packed.copy_(tensor)


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name. Quantised layers store their scales in buffers."""
    return dict(block.named_parameters()) | dict(block.named_buffers())


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
