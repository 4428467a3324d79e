"""Block-sparse attention with PyTorch's compiled `flex_attention`.

The keys are those of the image, then those of the text. The key blocks that hold text, and with it the end of the
image, are always attended to. Nothing is padded, and sizes are dynamic, so prompts and videos of all sizes use the same
compiled code. The compiler takes seconds to import, so this happens on first use.

On a CPU, compiled flex_attention (PyTorch 2.13) takes these masks only as partial blocks, and does not return the
log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hv_batch.engine.compiler import missing_compiler
from hv_batch.protocol import UserError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

CUDA_BLOCK = 128  # tokens; blocks on a GPU must be a multiple
MAX_COMPILED = 256  # variants per process: sizes of a video, numbers of heads


def check_backend(backend: str, block: int, device: torch.device) -> None:
    """Raise UserError if `backend` cannot run on `device` with blocks of `block` tokens."""
    if backend == "eager":
        return
    option = f"engine option sparse_attention: backend {backend!r}"
    if device.type == "cpu" and backend == "flex-flash":
        raise UserError(f"{option} needs a CUDA device; choose 'flex' or 'eager'.")
    if device.type == "cuda" and block % CUDA_BLOCK:
        raise UserError(
            f"{option} needs bricks of {CUDA_BLOCK} tokens or a multiple on a GPU, not {block}; choose brick [4, 4, 8]."
        )
    missing = _missing_flash_attention_4() if backend == "flex-flash" else missing_compiler(device)
    if missing:
        raise UserError(
            f"{option} needs {missing}, which this machine lacks; install it on all nodes, or choose 'eager'."
        )


def _missing_flash_attention_4() -> str | None:
    try:
        return None if find_spec("flash_attn.cute") else "the package flash-attn-4"
    except ModuleNotFoundError:  # of the parent package
        return "the package flash-attn-4"


def attend(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, kernel_options: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """See `block_sparse.BlockAttention`. On a CPU, the log-sum-exp is NaN."""
    import torch._dynamo
    import torch.fx.experimental._config
    from torch.nn.attention.flex_attention import AuxRequest

    image_len, text_len = len(q), len(k) - len(q)
    queries, keys, values = q.transpose(0, 1).unsqueeze(0), _image_first(k, text_len), _image_first(v, text_len)
    mask = _block_mask(kept, block, image_len, text_len)
    # Two sizes that happen to be equal in the first call must not be compiled as one size.
    separate_sizes = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED), separate_sizes:
        if q.device.type == "cpu":
            out, lse = _compiled()(queries, keys, values, block_mask=mask), q.new_full(q.shape[:2], torch.nan).float()
        else:
            out, aux = _compiled()(
                queries,
                keys,
                values,
                block_mask=mask,
                return_aux=AuxRequest(lse=True),
                kernel_options=kernel_options,
            )
            lse = aux.lse[0].transpose(0, 1)
    return out[0].transpose(0, 1), lse


attend_flash = partial(attend, kernel_options={"BACKEND": "FLASH"})


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Dynamic sizes: videos of all sizes share the compiled code. Without `fullgraph`, a failed compilation would fall
    # back to a kernel that holds all scores in memory.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _image_first(x: Tensor, text_len: int) -> Tensor:
    """[S + N, H, D] with the text first -> [1, H, N + S, D] with the image first."""
    return torch.cat((x[text_len:], x[:text_len])).transpose(0, 1).unsqueeze(0)


def _block_mask(kept: Tensor, block: int, image_len: int, text_len: int) -> BlockMask:
    """Return the mask of the chosen blocks `kept` [H, n, n], over the key blocks of image and text."""
    from torch.nn.attention.flex_attention import BlockMask

    complete, blocks = image_len // block, -(-(image_len + text_len) // block)
    chosen = kept.new_zeros(*kept.shape[:2], blocks)
    chosen[..., :complete] = kept[..., :complete]
    last = torch.zeros_like(chosen)
    last[..., complete:] = True
    is_cpu = kept.device.type == "cpu"
    count, index = _lists(chosen | last if is_cpu else last)
    full_count, full_index = (None, None) if is_cpu else _lists(chosen)
    return BlockMask.from_kv_blocks(
        count,
        index,
        full_count,
        full_index,
        BLOCK_SIZE=block,
        mask_mod=None if is_cpu else _allow,
        seq_lengths=(image_len, image_len + text_len),
        compute_q_blocks=False,  # needed for gradients only
    )


def _allow(_batch: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
    """Allow every key. The compiler must not notice that: without a mask, FLASH ignores the list of blocks."""
    return key >= 0


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen blocks [1, H, n] and their indices, first in each row of [1, H, n, blocks]."""
    index = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32).unsqueeze(0), index.to(torch.int32).unsqueeze(0)
