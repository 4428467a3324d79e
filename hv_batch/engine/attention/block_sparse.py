"""Block-sparse attention: the image queries attend to the text and to chosen blocks of the image.

`SparseKernel` is a `Kernel`, made for each forward. The text is short, so it stays dense: its queries attend to all
keys with the dense kernel, and every image query attends to all of its keys. The image has no padding; its last block
may be partial.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hv_batch.attention_methods import SparseAttention
from hv_batch.engine.attention import flex_blocks
from hv_batch.engine.attention.block_selection import select_blocks
from hv_batch.engine.attention.kernels import Kernel
from hv_batch.engine.attention.token_order import BlockLayout

# (q of the image [N, H, D], k and v [S + N, H, D] with the text first, chosen blocks [H, n, n], tokens of a block)
# -> (out [N, H, D], lse [N, H])
BlockAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class SparseKernel:
    """The kernel of one forward with `text_len` text tokens, then image tokens in the order of `layout`.

    `dense` computes the attention of the text queries.
    """

    options: SparseAttention
    layout: BlockLayout
    text_len: int
    dense: Kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `kernels`. All tokens must be there: raises ValueError if there are more or fewer rows."""
        rows = self.text_len + self.layout.tokens
        if len(q) != rows or len(k) != rows:
            raise ValueError(f"sparse attention got {len(q)} queries and {len(k)} keys of {rows} tokens")
        text, attend = self.text_len, BLOCK_ATTENTIONS[self.options.backend]
        kept = select_blocks(q[text:], k[text:], self.layout, self.options)
        parts = self.dense(q[:text], k, v), attend(q[text:], k, v, kept, self.layout.block)
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """One query block after the other, in float32: the reference for compiled kernels. See `BlockAttention`."""
    image_len, text_len, scale = len(q), len(k) - len(q), q.shape[-1] ** -0.5
    keys, values = (x.transpose(0, 1).float() for x in (k, v))  # [H, S + N, D]
    outs, lses = [], []
    for number, queries in enumerate(q.split(block)):
        chosen = kept[:, number]  # [H, n]
        # Heads may keep different numbers of blocks: the smaller sets are filled with blocks that are masked.
        most = int(chosen.sum(dim=1).max())
        used, index = chosen.int().sort(dim=1, descending=True, stable=True)
        tokens = index[:, :most, None] * block + torch.arange(block, device=q.device)  # [H, most, block]
        is_masked = (tokens >= image_len) | (used[:, :most, None] == 0)
        rows = tokens.clamp(max=image_len - 1).flatten(1).add_(text_len).unsqueeze(-1)
        near_keys, near_values = (
            torch.cat((x[:, :text_len], x.take_along_dim(rows, dim=1)), dim=1) for x in (keys, values)
        )
        scores = torch.einsum("qhd,hkd->hqk", queries.float(), near_keys) * scale
        scores[..., text_len:].masked_fill_(is_masked.flatten(1).unsqueeze(1), -torch.inf)
        outs.append(torch.einsum("hqk,hkd->qhd", scores.softmax(dim=-1), near_values).to(q.dtype))
        lses.append(scores.logsumexp(dim=-1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


BLOCK_ATTENTIONS: dict[str, BlockAttention] = {
    "eager": attend_blocks,
    "flex": flex_blocks.attend,
    "flex-flash": flex_blocks.attend_flash,
}
