"""8-bit attention: kernels that multiply q and k in INT8 or FP8, and the probabilities with v in FP8.

All of them subtract from k its mean over the tokens first. This changes every score of a query by the same amount, so
the softmax stays equal, and the remaining keys have a smaller range. The log-sum-exp is corrected, so ring attention
may merge partial results. (SageAttention 2, arXiv 2411.10958; FlashAttention-3, arXiv 2407.08608.)

`attend_reference` rounds to 8 bits and computes in float32, on any device: the reference for the other kernels, without
their speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from inspect import signature

import torch
from torch import Tensor

from hv_batch.attention_methods import QuantizedAttention
from hv_batch.engine.attention.kernels import Kernel, kernel_problem
from hv_batch.protocol import UserError

QUERY_BLOCK, KEY_BLOCK = 128, 64  # tokens with one INT8 scale for each head
INT8_MAX = 127.0
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SAGE_CAPABILITY = 8  # the lowest major compute capability that sageattention supports


def choose_quantized(options: QuantizedAttention) -> Kernel:
    """Return the kernel of these options; `check_quantized` must have accepted the device."""
    return KERNELS[options.qk, options.backend]


def check_quantized(options: QuantizedAttention, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if the backend of these options cannot run on `device` in `dtype`, with the reason."""
    option = f"engine option quantized_attention: backend {options.backend!r}"
    remedy = "Choose a device that has it, backend 'reference' (slow), or remove the option."
    if options.backend == "fa3" and (problem := kernel_problem("fa3", device, dtype)):
        raise UserError(f"{option} cannot run: {problem} {remedy}")
    if options.backend == "sage":
        if device.type != "cuda" or dtype is torch.float32:
            raise UserError(
                f"{option} needs a CUDA device and half precision, but this process has {device.type} and {dtype}. "
                f"{remedy}"
            )
        if find_spec("sageattention") is None or torch.cuda.get_device_capability(device)[0] < SAGE_CAPABILITY:
            raise UserError(
                f"{option} needs the package sageattention and a GPU of compute capability {SAGE_CAPABILITY}.0 or "
                f"above. {remedy}"
            )


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, quantize: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention of q and k rounded by `quantize`, and of probabilities and v rounded to FP8. A `Kernel` when bound."""
    scale, key_mean = q.shape[-1] ** -0.5, k.mean(dim=0, dtype=torch.float32)
    keys = quantize(k.float() - key_mean, KEY_BLOCK)
    values = _round_to_fp8(v.float(), v.float().abs().amax(dim=0))  # one scale for each head and channel
    outs, lses = [], []
    for queries in quantize(q.float(), QUERY_BLOCK).split(QUERY_BLOCK):  # bounds the memory
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        largest = scores.amax(dim=-1, keepdim=True)
        weights = (scores - largest).exp()
        total = weights.sum(dim=-1, keepdim=True)
        rounded = _round_to_fp8(weights, weights.new_ones(()))
        outs.append((torch.einsum("hqk,khd->hqd", rounded, values) / total).transpose(0, 1).to(q.dtype))
        lses.append((largest + total.log()).squeeze(-1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses) + _mean_scores(q, key_mean)


def attend_sage(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """SageAttention (package sageattention), which quantises and smooths k itself. Not yet run on a GPU."""
    from sageattention import sageattn

    out, lse = sageattn(
        q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), tensor_layout="NHD", is_causal=False, return_lse=True
    )
    return out[0], lse[0].transpose(0, 1).float()


def attend_fa3(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-3 in FP8 (package flash_attn_3), with one scale for each head. Not yet run on a GPU."""
    from flash_attn_interface import flash_attn_func

    key_mean = k.mean(dim=0, dtype=torch.float32)
    scaled = {}
    for name, x in (("q", q.float()), ("k", k.float() - key_mean), ("v", v.float())):
        scale = x.abs().amax(dim=(0, 2)).clamp_min(torch.finfo(torch.float32).tiny) / FP8_MAX
        scaled[name] = (x / scale.unsqueeze(-1)).to(FP8).unsqueeze(0), scale.unsqueeze(0)
    # As in `kernels.attend_fa3`: older versions always returned the LSE.
    returns_lse = {"return_attn_probs": True} if "return_attn_probs" in signature(flash_attn_func).parameters else {}
    out, lse, *_ = flash_attn_func(
        *(values for values, _ in scaled.values()),
        num_splits=1,
        **{f"{name}_descale": scale for name, (_, scale) in scaled.items()},
        **returns_lse,
    )
    return out[0].to(q.dtype), lse[0].transpose(0, 1) + _mean_scores(q, key_mean)


def _mean_scores(q: Tensor, key_mean: Tensor) -> Tensor:
    """Return the score of each query with the mean key [L, H]: what its scores lack after the mean is subtracted."""
    return torch.einsum("qhd,hd->qh", q.float(), key_mean) * q.shape[-1] ** -0.5


def _to_int8(x: Tensor, block: int) -> Tensor:
    """Round [L, H, D] to INT8 with one scale for each head and `block` tokens."""
    parts = []
    for part in x.split(block):
        scale = part.abs().amax(dim=(0, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / INT8_MAX
        parts.append((part / scale).round() * scale)
    return torch.cat(parts)


def _to_fp8(x: Tensor, _block: int) -> Tensor:
    """Round [L, H, D] to FP8 with one scale for each head."""
    return _round_to_fp8(x, x.abs().amax(dim=(0, 2), keepdim=True))


def _round_to_fp8(x: Tensor, largest: Tensor) -> Tensor:
    """Round x to FP8 such that `largest` becomes the largest value of the format."""
    scale = largest.clamp_min(torch.finfo(x.dtype).tiny) / FP8_MAX
    return (x / scale).to(FP8).to(x.dtype) * scale


KERNELS: dict[tuple[str, str], Kernel] = {
    ("int8", "reference"): partial(attend_reference, quantize=_to_int8),
    ("fp8", "reference"): partial(attend_reference, quantize=_to_fp8),
    ("int8", "sage"): attend_sage,
    ("fp8", "fa3"): attend_fa3,
}
