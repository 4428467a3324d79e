"""FP8 weights as released: 8 bits per element and one scale per matrix, dequantised on every use.

The file has the same tensor names as the bf16 file. The weights of every Linear in the blocks are float8_e4m3fn. A
second file, the map, holds one scale per module. These weights take half the memory. The speed is the same, because the
product is computed in the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448; the largest weight of a matrix is scaled to it


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight * scale` in `dtype`. Both are rounded to it before the product: the order of the release."""
    return weight.to(dtype) * scale.to(dtype)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (float8_e4m3fn weights, float32 scale) of a matrix, rounded to nearest even as in the release.

    The scale is rounded up to a bfloat16 number. The release rounds every scale to the dtype of the arithmetic;
    rounding it before the division costs no accuracy, and rounding up keeps all weights in range. A matrix of zeros has
    scale 1.
    """
    wide = weight.float()
    low, high = wide.aminmax()
    scale = _round_up_to_bf16(torch.maximum(-low, high) / FP8_MAX)
    scale = torch.where(scale > 0, scale, 1.0)
    return (wide / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


def _round_up_to_bf16(value: Tensor) -> Tensor:
    """Return the smallest bfloat16 number >= a float32 >= 0: its upper 16 bits, plus one if the lower are not zero."""
    bits = value.view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


class Fp8Linear(nn.Module):
    """A Linear that stores its weight in 8 bits. Each call dequantises the weight temporarily to the input's dtype.

    `scale` has one element, in the dtype of the arithmetic; it comes from the map. `weight` and `bias` have the names
    that a Linear has, so the tensor names of the checkpoint apply.
    """

    weight: nn.Parameter  # [out, in] float8_e4m3fn
    scale: Tensor  # []
    bias: nn.Parameter | None  # [out]

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=FP8), requires_grad=False)
        self.register_buffer("scale", torch.ones(()))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantise(self.weight, self.scale, x.dtype), self.bias)


def block_linears(model: nn.Module) -> dict[str, nn.Linear | Fp8Linear]:
    """Return the modules that the release quantises, by name: every Linear of the DiT's double and single blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Fp8Linear) and name.startswith(("double_blocks.", "single_blocks."))
    }


def hold_in_fp8(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the named Linears by empty `Fp8Linear`s on the meta device, to be filled from a checkpoint."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.device("meta"):
            empty = Fp8Linear(linear.in_features, linear.out_features, linear.bias is not None)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, empty)
