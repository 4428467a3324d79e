"""Attention kernels that return the log-sum-exp of the scores: `kernel(q, k, v) -> (out, lse)`.

One kernel call processes one sequence without a mask; callers trim the padding before. Ring attention needs the
log-sum-exp (LSE) to merge partial results exactly (`merge`). Flash kernels compute it anyway, so a single rank runs the
same kernel and discards it.

    q [Lq, H, D], k and v [Lk, H, D]  ->  out [Lq, H, D] in q's dtype, lse [Lq, H] float32

Inputs may be strided (slices of a packed qkv); only D must be contiguous. Lq and Lk must not be 0, because the CPU
flash kernel divides by them and crashes the process. Kernels are chosen by name, and the name is part of a video's
identity. `hv_batch.attention_kernels` says which one is the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from hv_batch.attention_kernels import HALF_ONLY, PACKAGES
from hv_batch.engine.attention.torch_flash import replaced_problem
from hv_batch.protocol import UserError

Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def attend_math(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Plain softmax attention in float32 with O(Lq Lk) memory. The reference for the other kernels."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    out = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v.float())
    return out.to(q.dtype), scores.logsumexp(dim=-1).transpose(0, 1)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's fused kernels. Called directly, because `scaled_dot_product_attention` does not return the LSE."""
    q_len = q.shape[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, L, D]
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype is torch.float32:  # the CUDA flash kernel supports half precision only
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    # The memory-efficient kernel pads the LSE to a multiple of 32 queries.
    return out[0].transpose(0, 1), lse[0, :, :q_len].transpose(0, 1)


def attend_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The flash-attn package. `return_attn_probs` makes it return the LSE; it does not store the probabilities."""
    from flash_attn import flash_attn_func

    out, lse, _ = flash_attn_func(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), return_attn_probs=True)
    return out[0], lse[0].transpose(0, 1)


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention, which is built into PyTorch and often the fastest kernel on Hopper."""
    q_len, heads, _ = q.shape
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, L, D]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out[0].transpose(0, 1), lse.view(heads, q_len).transpose(0, 1)


def attend_fa3(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-3 (package flash_attn_3), for Hopper. With one split, its sums have a fixed order."""
    from flash_attn_interface import flash_attn_func

    # Before August 2025 it always returned the LSE, and had no such argument.
    returns_lse = {"return_attn_probs": True} if "return_attn_probs" in signature(flash_attn_func).parameters else {}
    out, lse, *_ = flash_attn_func(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), num_splits=1, **returns_lse)
    return out[0], lse[0].transpose(0, 1)


def attend_fa4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-4 (package flash-attn-4), for Hopper and Blackwell. It compiles a kernel on its first call."""
    from flash_attn.cute import flash_attn_func

    out, lse, *_ = flash_attn_func(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), num_splits=1, return_lse=True)
    return out[0], lse[0].transpose(0, 1)


KERNELS: dict[str, Kernel] = {
    "math": attend_math,
    "sdpa": attend_sdpa,
    "cudnn": attend_cudnn,
    "flash": attend_flash,
    "fa3": attend_fa3,
    "fa4": attend_fa4,
}


class _Package(NamedTuple):
    module: str  # that has flash_attn_func
    capabilities: tuple[int, ...] = ()  # major compute capabilities that it supports; empty: it checks itself


_MODULES: Mapping[str, _Package] = {
    "flash": _Package("flash_attn"),
    "fa3": _Package("flash_attn_interface", (9,)),
    "fa4": _Package("flash_attn.cute", (9, 10)),
}


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the kernel with this name. There is no automatic fallback, so that two nodes never differ in pixels.

    Raises UserError if the name is unknown, or if the kernel cannot run on `device` in `dtype`.
    """
    if name not in KERNELS:
        raise UserError(f"attention {name!r} is unknown; allowed are {', '.join(KERNELS)}.")
    if problem := kernel_problem(name, device, dtype):
        raise UserError(problem)
    return KERNELS[name]


def kernel_problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why a kernel cannot run on `device` in `dtype`, with the remedy; None if it can."""
    if name == "sdpa" and device.type == "cuda" and dtype is not torch.float32:
        return replaced_problem()
    if name not in HALF_ONLY:
        return None
    if device.type != "cuda" or dtype is torch.float32:
        what = f"the {PACKAGES[name]} package" if name in PACKAGES else "cuDNN"
        return (
            f"attention {name!r} needs {what}, a CUDA device and half precision, but this process has {device.type} "
            f"and {dtype}; choose 'sdpa'."
        )
    if name == "cudnn":
        available = torch.backends.cudnn.is_available()
        return None if available else "attention 'cudnn' needs cuDNN, which this build of PyTorch lacks; choose 'sdpa'."
    package = _MODULES[name]
    major, minor = torch.cuda.get_device_capability(device)
    if package.capabilities and major not in package.capabilities:
        supported = " and ".join(f"{each}.x" for each in package.capabilities)
        return (
            f"attention {name!r} needs a GPU of compute capability {supported}, but this one has {major}.{minor}; "
            "choose 'cudnn' or 'sdpa'."
        )
    return _missing(name, package.module)


def _missing(name: str, module: str) -> str | None:
    """Why the package of a kernel cannot be used. It is imported, because packages may be built for another PyTorch."""
    try:
        import_module(module).flash_attn_func  # noqa: B018
    except Exception as error:  # noqa: BLE001  # a broken build raises anything
        return (
            f"attention {name!r} needs the package {PACKAGES[name]} ({module}.flash_attn_func), which cannot be "
            f"imported: {type(error).__name__}: {error}. Install it, or choose 'cudnn' or 'sdpa'."
        )
    return None


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the attention over two disjoint key sets into the attention over their union, in float32.

    out [L, H, D] and lse [L, H] are float32. Uses sigmoid instead of exp(lse), so that no score can overflow.
    """
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(out, other_out.float(), weight), torch.logaddexp(lse, other_lse)
