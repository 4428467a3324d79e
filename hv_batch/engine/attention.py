"""Attention kernels that also tell how sure they are: `kernel(q, k, v) -> (out, lse)`.

One kernel call sees one sequence and no mask: padding is trimmed before it gets here. The log-sum-exp of the scores is
what lets a ring merge partial results exactly (`merge`); flash kernels compute it anyway, so a single rank runs
the same kernel and drops it.

    q [Lq, H, D], k and v [Lk, H, D]  ->  out [Lq, H, D] in q's dtype, lse [Lq, H] float32

Inputs may be strided (slices of a packed qkv); only D must be contiguous. Lq and Lk must not be 0: the CPU flash
kernel divides by them and takes the process down. Backends have names because they are part of a video's identity.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from hv_batch.protocol import UserError

Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def attend_math(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention written out in float32: the oracle of the others, with O(Lq Lk) memory."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    out = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v.float())
    return out.to(q.dtype), scores.logsumexp(dim=-1).transpose(0, 1)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own fused kernels, called below `scaled_dot_product_attention` because that hides the LSE."""
    q_len = q.shape[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, L, D]
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype is torch.float32:  # the CUDA flash kernel knows half precision only
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    # The memory-efficient kernel pads the LSE to a multiple of 32 queries.
    return out[0].transpose(0, 1), lse[0, :, :q_len].transpose(0, 1)


def attend_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The flash-attn package. `return_attn_probs` is its switch for the LSE; no probabilities are kept."""
    from flash_attn import flash_attn_func

    out, lse, _ = flash_attn_func(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), return_attn_probs=True)
    return out[0], lse[0].transpose(0, 1)


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention, as PyTorch has it built in: often the fastest on Hopper without another package."""
    q_len, heads, _ = q.shape
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, L, D]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out[0].transpose(0, 1), lse.view(heads, q_len).transpose(0, 1)


KERNELS: dict[str, Kernel] = {
    "math": attend_math,
    "sdpa": attend_sdpa,
    "cudnn": attend_cudnn,
    "flash": attend_flash,
}
HALF_ONLY = ("cudnn", "flash")  # know bf16 and fp16 alone


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel of that name. None is chosen by what happens to be installed: two nodes must not differ in pixels.

    Raises UserError for an unknown name, and for "flash" and "cudnn" where they cannot run.
    """
    if name not in KERNELS:
        raise UserError(f"attention {name!r} is not known; allowed: {', '.join(KERNELS)}.")
    fits = device.type == "cuda" and dtype is not torch.float32
    if name == "flash" and not (fits and find_spec("flash_attn") is not None):
        raise UserError(
            f"attention 'flash' needs the flash-attn package, a CUDA device and half precision, and this process has "
            f"{device.type} and {dtype}; install the 'gpu' extra, or choose 'sdpa'."
        )
    if name == "cudnn" and not (fits and torch.backends.cudnn.is_available()):
        raise UserError(
            f"attention 'cudnn' needs cuDNN, a CUDA device and half precision, and this process has {device.type} and "
            f"{dtype}; choose 'sdpa'."
        )
    return KERNELS[name]


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the attention over each, in float32.

    out [L, H, D] and lse [L, H] float32. Written with sigmoid instead of exp(lse) so that no score can overflow.
    """
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(out, other_out.float(), weight), torch.logaddexp(lse, other_lse)
