"""The choice of key blocks for each query block and head, in block-sparse attention.

The probability that a query block gives to a key block is estimated from means: each block is divided into `PARTS`
parts of consecutive tokens, q and k are averaged over a part, and a softmax over all parts of all key blocks gives the
probabilities of each part of the queries. Every query block then keeps the same number of blocks: those that the layout
always keeps, and the most probable others. (Related: Jenga, arXiv 2505.16864, which uses one mean per block.)

Scores are compared in float32. Ranks that divide the heads (Ulysses) each see all tokens of their heads, so the choice
needs no communication.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hv_batch.attention_methods import SparseAttention
from hv_batch.engine.attention.token_order import BlockLayout

PARTS = 4  # of a block


def select_blocks(q: Tensor, k: Tensor, layout: BlockLayout, options: SparseAttention) -> Tensor:
    """Return which key blocks each query block attends to: bool [H, n, n].

    q and k [N, H, D] are the image tokens in the order of `layout`, with n blocks. A set for a larger density, or a
    larger `top_p`, contains that for a smaller one.
    """
    return choose_blocks(estimate_probabilities(q, k, layout), layout, options)


def choose_blocks(probability: Tensor, layout: BlockLayout, options: SparseAttention) -> Tensor:
    """Return the choice [H, n, n] of `select_blocks` for given probabilities [H, n, n]."""
    budget = min(layout.blocks, math.ceil(options.density * layout.blocks))
    # Probabilities are at most 1. Blocks that are always kept come first, so they count against the budget.
    ranked = probability.masked_fill(layout.always, 2.0).sort(dim=-1, descending=True, stable=True).indices
    kept = layout.always.expand_as(probability).clone().scatter_(-1, ranked[..., :budget], True)
    if options.top_p is not None:
        falling, index = probability.sort(dim=-1, descending=True, stable=True)
        before = falling.cumsum(dim=-1) - falling
        kept |= torch.zeros_like(kept).scatter_(-1, index, before < options.top_p)
    return kept


def estimate_probabilities(q: Tensor, k: Tensor, layout: BlockLayout, parts: int = PARTS) -> Tensor:
    """Return the estimated probability that the queries of a block give to each key block: float32 [H, n, n]."""
    parts = parts if layout.block % parts == 0 else 1
    q_means, k_means = (_part_means(x, layout.block // parts, layout.blocks * parts) for x in (q, k))
    is_empty = torch.arange(layout.blocks * parts, device=q.device) * (layout.block // parts) >= q.shape[0]
    # The weight of a part of the queries within its block. Only the last block may have empty parts.
    weights = (~is_empty).float().unflatten(0, (layout.blocks, parts))
    weights = (weights / weights.sum(dim=1, keepdim=True)).flatten()
    by_head = []
    for q_head, k_head in zip(q_means.unbind(1), k_means.unbind(1), strict=True):  # bounds the memory
        scores = (q_head @ k_head.T).mul_(q.shape[-1] ** -0.5).masked_fill_(is_empty, -torch.inf)
        by_part = scores.softmax(dim=-1).mul_(weights.unsqueeze(-1))
        by_head.append(by_part.unflatten(1, (-1, parts)).sum(2).unflatten(0, (-1, parts)).sum(1))
    return torch.stack(by_head)


def _part_means(x: Tensor, size: int, parts: int) -> Tensor:
    """Return the means over `size` consecutive tokens of [N, H, D]: float32 [parts, H, D]; 0 for a part without any."""
    full = x.shape[0] // size
    means = x.new_zeros(parts, *x.shape[1:], dtype=torch.float32)
    means[:full] = x[: full * size].reshape(full, size, *x.shape[1:]).mean(dim=1, dtype=torch.float32)
    if x.shape[0] > full * size:
        means[full] = x[full * size :].mean(dim=0, dtype=torch.float32)
    return means
