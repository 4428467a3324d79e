"""Weights on the host: the DiT's blocks stream to the device one after the other, each while the one before computes.

    host      [ block 0 | block 1 | block 2 | ... ]      pinned memory, or the pages of the checkpoint file
    device    [ buffer A ] [ buffer B ]                  each as large as the largest block

    compute stream   0 in A | 1 in B | 2 in A | ...
    copy stream           1 -> B | 2 -> A | 3 -> B | ...

A copy may start when the block that used its buffer before has been computed, and a block when its copy is complete:
both are told by events between the two streams, so the host waits for neither. After the last block comes the first
again, for the next step. Where a block's weights lie changes neither its arithmetic nor its communication: the same
bits, on one rank as in a group.

Copies are queued after the kernels of the block before. So copies from memory that is not pinned, during which the
driver holds the host thread, overlap with computing as well.

On a CPU the same code runs, without streams: a copy is then complete when it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hv_batch.engine.dit.model import HYVideoDiT

# Where a tensor may start in a buffer: as aligned as the CUDA allocator's own tensors, whatever kernel reads it.
ALIGNMENT = 512

# PyTorch rounds a pinned allocation up to a power of two, for 25 GB of single tensors 10 GB more; so they share
# allocations that are one.
ARENA_BYTES = 2**30


def offload_blocks(model: HYVideoDiT, device: torch.device, *, pinned: bool) -> BlockStreamer:
    """Give a model that was loaded on the CPU to `device`, all but its blocks, which stay and are streamed from now on.

    `pinned` packs the blocks' weights into page-locked memory of this process, from which a GPU copies by itself.
    Without it they stay where they are: loaded in the dtype of their file, in its pages, which the ranks of a node
    share. Anything that changes the blocks' modules (quantisation) comes before.
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
    """A block that computes with the streamer's copy of its weights."""

    def __init__(self, block: nn.Module, streamer: BlockStreamer, index: int) -> None:
        super().__init__()
        self.block = block
        self._streamer = streamer
        self._index = index

    def forward(self, *args: Any) -> Any:
        with self._streamer.resident(self._index) as weights:
            return functional_call(self.block, weights, args, tie_weights=False)


class BlockStreamer:
    """Two buffers on `device` through which the weights of `blocks` pass, in their order and round again."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._host = [_tensors(block) for block in blocks]
        size = max(sum(map(_aligned_bytes, tensors.values())) for tensors in self._host)
        self._slots = tuple(_Slot(size, device) for _ in range(2))
        self._next = 0  # the slot that the next copy goes to: not the one in use
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def device_bytes(self) -> int:
        """All that the blocks' weights ever occupy on the device."""
        return sum(slot.memory.nbytes for slot in self._slots)

    @contextmanager
    def resident(self, index: int) -> Iterator[dict[str, Tensor]]:
        """The weights of block `index` on the device, by name, valid within the context; then fetches the next block.

        Calls in another order than the blocks' cost a copy that nothing hides, and are otherwise as good.
        """
        slot = self._find(index) or self._fetch(index)
        slot.await_copy()
        try:
            yield slot.views
        finally:  # also after an error: what was queued of this block may still read the buffer
            slot.release()
        following = (index + 1) % len(self._host)
        if self._find(following) is None:
            self._fetch(following)

    def _find(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == index), None)

    def _fetch(self, index: int) -> _Slot:
        slot = self._slots[self._next]
        self._next = 1 - self._next
        slot.fill(index, self._host[index], self._copy_stream)
        return slot


class _Slot:
    """One buffer, the block it holds, and the events that keep copying and computing apart (None without streams)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.views: dict[str, Tensor] = {}
        streams = device.type == "cuda"
        self._copied = torch.cuda.Event() if streams else None
        self._released = torch.cuda.Event() if streams else None
        self.release()  # fresh memory may still be read by what was queued before it was freed

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
    """Tensors shaped as those of `like`, one behind the other in `memory`."""
    views, start = {}, 0
    for name, tensor in like.items():
        views[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _aligned_bytes(tensor)
    return views


@torch.no_grad()
def _pack(tensors: Iterable[Tensor], pin_memory: bool) -> None:
    """Move the data of CPU tensors, one after the other, into arenas; their former memory is free after each."""
    remaining = list(tensors)
    while remaining:
        total = sum(map(_aligned_bytes, remaining))
        # The last arena need not be larger than its content, rounded as PyTorch rounds it.
        size = max(min(ARENA_BYTES, 1 << (total - 1).bit_length()), _aligned_bytes(remaining[0]))
        arena = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
        start = 0
        while remaining and start + _aligned_bytes(remaining[0]) <= size:
            tensor = remaining.pop(0)
            packed = arena[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += _aligned_bytes(tensor)
            tensor.data = packed.copy_(tensor)


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers: quantised layers keep their scales in the latter."""
    return dict(block.named_parameters()) | dict(block.named_buffers())


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
