"""FP8 weights as released (spec section 6): 8 bits an element, one scale a matrix, dequantised where they are used.

The file holds the same names as the bf16 one; the weights of every Linear inside the blocks are float8_e4m3fn, and a
second file, the map, holds one scale a module. Half the memory for these weights, and no speed: the product is bf16.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448: what the largest weight of a matrix becomes


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight * scale` in `dtype`, both rounded to it before they are multiplied: the released order, bit for bit."""
    return weight.to(dtype) * scale.to(dtype)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as (float8_e4m3fn weights, their float32 scale), rounded to nearest even, as the release quantises.

    The scale is a bfloat16 number, rounded up. The release rounds any scale to the dtype of the arithmetic anyway;
    rounded before the weights are divided by it, it costs no accuracy, and rounded up, no weight leaves the range. A
    matrix of zeros has scale 1.
    """
    wide = weight.float()
    low, high = wide.aminmax()
    scale = _round_up_to_bf16(torch.maximum(-low, high) / FP8_MAX)
    scale = torch.where(scale > 0, scale, 1.0)
    return (wide / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


def _round_up_to_bf16(value: Tensor) -> Tensor:
    """The smallest bfloat16 not below a float32 >= 0: its upper 16 bits, plus one where the lower are not zero."""
    bits = value.view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


class Fp8Linear(nn.Module):
    """A Linear whose weight stays in 8 bits; each call makes the weight in the input's dtype and forgets it.

    `scale` has one element and the dtype of the arithmetic. `weight` and `bias` are named as a Linear's are, so the
    names of the checkpoint hold; `scale` comes from the map.
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
    """The modules that the release quantises: every Linear of the DiT's double and single blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Fp8Linear) and name.startswith(("double_blocks.", "single_blocks."))
    }


def hold_in_fp8(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the named Linears by empty `Fp8Linear`s on the meta device, for a checkpoint to fill."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.device("meta"):
            empty = Fp8Linear(linear.in_features, linear.out_features, linear.bias is not None)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, empty)
