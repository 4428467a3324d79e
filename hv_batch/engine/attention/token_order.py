"""The order of image tokens for block-sparse attention: tokens that are near each other in the video form a block.

A *brick* is a box of tokens along t, h and w. The order lists the tokens brick by brick. Blocks are consecutive tokens
of this order, as many as a brick has. Bricks at the edges of the grid may be partial. They follow all complete bricks,
so a complete brick is exactly one block, no token is padding, and only the last block may be partial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # tokens along t, h, w

# Offsets (t, h, w) from a token to half of its neighbours; the other half follows by symmetry.
_OFFSETS = [(t, h, w) for t in (0, 1) for h in (-1, 0, 1) for w in (-1, 0, 1) if (t, h, w) > (0, 0, 0)]


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The order of the N image tokens of a grid, and its n blocks."""

    block: int  # tokens of a block
    order: Tensor  # [N]: the token (in t, h, w order) at each place of the order
    inverse: Tensor  # [N]: the place of each token
    always: Tensor  # bool [n, n]: key blocks that a query block always keeps: itself, its neighbours, a partial block

    @property
    def tokens(self) -> int:
        return len(self.order)

    @property
    def blocks(self) -> int:
        return len(self.always)


@lru_cache(maxsize=2)  # one sample runs at a time; two entries cover alternating shapes
def block_layout(grid: Grid, brick: Grid, neighbours: str, device: torch.device) -> BlockLayout:
    """Return the layout of a (t, h, w) grid of tokens, with tensors on `device`.

    `neighbours` is a value of `SparseAttention.neighbours`.
    """
    order, block = token_order(grid, brick), math.prod(brick)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    count = -(-len(order) // block)
    always = torch.eye(count, dtype=torch.bool)
    block_of = (inverse // block).reshape(grid)
    for offset in _OFFSETS:
        if neighbours == "all" or (neighbours == "faces" and sum(map(abs, offset)) == 1):
            one, other = _shifted_pairs(block_of, offset)
            always[one, other] = always[other, one] = True
    if len(order) % block:
        always[:, -1] = True  # the kernels process it together with the text
    return BlockLayout(block, order.to(device), inverse.to(device), always.to(device))


@lru_cache(maxsize=2)
def token_order(grid: Grid, brick: Grid) -> Tensor:
    """Return the order [N] of the tokens of a grid by brick, on the CPU: complete bricks, then partial ones."""
    sizes, token = torch.tensor(grid), torch.arange(math.prod(grid))
    position = torch.stack(torch.unravel_index(token, grid), dim=1)  # [N, 3]
    side = torch.tensor(brick)
    place, within = position // side, position % side
    is_partial = ((place + 1) * side > sizes).any(dim=1)
    key = torch.zeros_like(token)
    counts = [2, *(-(-sizes // side)).tolist(), *brick]
    for digit, base in zip((is_partial, *place.unbind(1), *within.unbind(1)), counts, strict=True):
        key = key * base + digit
    return key.argsort()


def _shifted_pairs(volume: Tensor, offset: Grid) -> tuple[Tensor, Tensor]:
    """Return the values of all pairs of cells of `volume` that differ by `offset`."""
    here = tuple(slice(max(0, -o), size - max(0, o)) for o, size in zip(offset, volume.shape, strict=True))
    there = tuple(slice(max(0, o), size + min(0, o)) for o, size in zip(offset, volume.shape, strict=True))
    return volume[here].flatten(), volume[there].flatten()
