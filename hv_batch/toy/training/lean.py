"""diffusers' VAE and DiT with parts replaced by the same sums in another order: less than half the time on a CPU.

VAE: channels stay last in memory, which PyTorch's convolutions and norms want there; a single frame, whose causal
padding is three times the same frame, is convolved in two dimensions with the sum of the three taps.
DiT: in bfloat16 attention as two batched matrix products and a softmax, which PyTorch's fused kernel is slower than,
above all backwards. In single precision that is twice as fast as they are, and Muon's products are to be in it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lean_autocast(device: torch.device) -> torch.autocast:
    """bfloat16 within it, where the device computes that faster than single precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or _has_bfloat16())


def _has_bfloat16() -> bool:
    """Whether the CPU has instructions for it. Others take ten times as long as in single precision."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def make_lean_vae(model: Any) -> Any:
    """`model`, an AutoencoderKLHunyuanVideo, whose blocks compute in the layout of channels last from now on."""
    from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as parts

    lean = {
        parts.HunyuanVideoCausalConv3d: _convolve,
        parts.HunyuanVideoResnetBlockCausal3D: _residual,
        parts.HunyuanVideoUpsampleCausal3D: _upsample,
    }
    for module in model.modules():
        if type(module) in lean:
            module.forward = partial(lean[type(module)], module)
    return model


def _convolve(module: Any, x: Tensor) -> Tensor:
    conv = module.conv
    if conv.kernel_size[0] == 1:
        return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)
    if x.shape[2] == 1:
        frame = x[:, :, 0].contiguous(memory_format=torch.channels_last)
        padded = F.pad(frame, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, conv.weight.sum(2), conv.bias, conv.stride[1:])[:, :, None]
    padded = F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
    return F.conv3d(padded.contiguous(memory_format=torch.channels_last_3d), conv.weight, conv.bias, conv.stride)


def _residual(module: Any, x: Tensor) -> Tensor:
    inner = module.conv2(F.silu(module.norm2(module.conv1(F.silu(module.norm1(x))))))
    return inner + (x if module.conv_shortcut is None else module.conv_shortcut(x))


def _upsample(module: Any, x: Tensor) -> Tensor:
    times, factor = int(module.upsample_factor[0]), int(module.upsample_factor[1])
    frames = x.permute(0, 2, 3, 4, 1)
    frames = frames.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if times > 1:  # the first frame stands alone
        frames = torch.cat((frames[:, :1], frames[:, 1:].repeat_interleave(times, 1)), 1)
    upsampled: Tensor = module.conv(frames.permute(0, 4, 1, 2, 3))
    return upsampled


@contextmanager
def lean_steps(device: torch.device) -> Iterator[None]:
    """Within it a step of the DiT's training takes the fastest way that `device` has."""
    from diffusers.models.transformers import transformer_hunyuan_video
    from torch.optim import _muon

    if device.type != "cpu":
        yield
    elif _has_bfloat16():
        with _replaced(transformer_hunyuan_video, "dispatch_attention_fn", _attend):
            yield
    else:
        with _replaced(_muon, "_zeropower_via_newtonschulz", _orthogonal):
            yield


@contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, own)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: Any) -> Tensor:
    """Attention of [B, S, heads, D] to the keys that attn_mask [B, 1, 1, S] is true of."""
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    unseen = torch.zeros(attn_mask.shape[0], 1, attn_mask.shape[-1], dtype=q.dtype).masked_fill(~attn_mask[:, 0], -1e4)
    scores = torch.baddbmm(unseen.repeat_interleave(query.shape[2], 0), q, k.mT, alpha=query.shape[-1] ** -0.5)
    return (scores.softmax(-1).to(v.dtype) @ v).unflatten(0, (len(query), -1)).transpose(1, 2)


def _orthogonal(gradient: Tensor, factors: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About the nearest matrix with orthogonal rows or columns, by Muon's polynomial, in single precision."""
    is_tall = gradient.shape[0] > gradient.shape[1]
    found = gradient.T if is_tall else gradient
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(
            found, torch.addmm(gram, gram, gram, beta=factors[1], alpha=factors[2]), found, beta=factors[0]
        )
    return found.T if is_tall else found
