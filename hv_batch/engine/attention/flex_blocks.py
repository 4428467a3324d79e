"""Block-sparse attention with PyTorch's compiled `flex_attention`.

The keys are those of the image, then those of the text, then padding up to a fixed length, so that prompts of any
length use the same compiled code. The blocks that hold text, and with it the end of the image, are always attended to;
a mask excludes the padding in them. Nothing is padded inside the image. The compiler takes seconds to import, so this
happens on first use.

On a CPU, compiled flex_attention (PyTorch 2.13) has two limits: it takes these masks only as partial blocks, for which
it evaluates the mask in every block, and it does not return the log-sum-exp.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hv_batch.protocol import UserError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TEXT_ROOM = 320  # tokens; the padded text has a multiple of it. Prompts have at most 315.
CUDA_BLOCK = 128  # tokens; blocks on a GPU must be a multiple
MAX_COMPILED = 256  # variants per process: sizes of a video, numbers of heads


def check_backend(backend: str, block: int, device: torch.device) -> None:
    """Raise UserError if `backend` cannot run on `device` with blocks of `block` tokens."""
    if backend == "eager":
        return
    option = f"engine option sparse_attention: backend {backend!r}"
    if device.type == "cpu":
        if backend == "flex-flash":
            raise UserError(f"{option} needs a CUDA device; choose 'flex' or 'eager'.")
        if not any(map(shutil.which, ("g++", "clang++"))):
            raise UserError(
                f"{option} needs a C++ compiler (g++), which this machine lacks; install one, or use 'eager'."
            )
        return
    if block % CUDA_BLOCK:
        raise UserError(
            f"{option} needs bricks of {CUDA_BLOCK} tokens or a multiple on a GPU, not {block}; choose brick [4, 4, 8]."
        )
    package = {"flex": "triton", "flex-flash": "flash_attn.cute"}[backend]
    if not _is_installed(package):
        raise UserError(f"{option} needs the package {package}; install it on all nodes, or choose another backend.")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def attend(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, kernel_options: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """See `block_sparse.BlockAttention`. On a CPU, the log-sum-exp is NaN."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import AuxRequest

    image_len, text_len = len(q), len(k) - len(q)
    room = -(-text_len // TEXT_ROOM) * TEXT_ROOM
    blocks = -(-(image_len + room) // block)
    queries = q.transpose(0, 1).unsqueeze(0)  # [1, H, N, D]
    keys, values = (_image_first(x, text_len, blocks * block) for x in (k, v))
    mask = _block_mask(kept, block, image_len, text_len, blocks)
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED):
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


def _image_first(x: Tensor, text_len: int, rows: int) -> Tensor:
    """[S + N, H, D] with the text first -> [1, H, rows, D] with the image first, then the text, then zeros."""
    moved = x.new_zeros(1, x.shape[1], rows, x.shape[2])
    image_len = len(x) - text_len
    moved[0, :, :image_len] = x[text_len:].transpose(0, 1)
    moved[0, :, image_len : len(x)] = x[:text_len].transpose(0, 1)
    return moved


def _block_mask(kept: Tensor, block: int, image_len: int, text_len: int, blocks: int) -> BlockMask:
    """Return the mask of the chosen blocks `kept` [H, n, n] over `blocks` key blocks, image first."""
    from torch.nn.attention.flex_attention import BlockMask

    complete, used = image_len // block, -(-(image_len + text_len) // block)
    chosen = kept.new_zeros(*kept.shape[:2], blocks)
    chosen[..., :complete] = kept[..., :complete]
    last = torch.zeros_like(chosen)
    last[..., complete:used] = True
    end = torch.tensor(image_len + text_len, device=kept.device)  # a tensor, so that its value is not compiled in

    def is_valid(_batch: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
        return key < end

    # Blocks with text need the mask; the others are full, except on a CPU (see above).
    is_cpu = kept.device.type == "cpu"
    count, index = _lists(chosen | last if is_cpu else last)
    full_count, full_index = (None, None) if is_cpu else _lists(chosen)
    return BlockMask.from_kv_blocks(
        count,
        index,
        full_count,
        full_index,
        BLOCK_SIZE=block,
        mask_mod=is_valid,
        seq_lengths=(image_len, blocks * block),
        compute_q_blocks=False,  # needed for gradients only
    )


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen blocks [1, H, n] and their indices, first in each row of [1, H, n, blocks]."""
    index = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32).unsqueeze(0), index.to(torch.int32).unsqueeze(0)
