"""Matrix products in FP8: the Linears of the DiT's blocks on the fastest path of the tensor cores (`fp8: matmul`).

A weight gets one scale a row (an output channel), once; an activation one scale a row (a token), on every call. Both
become float8_e4m3fn; `torch._scaled_mm` multiplies them with sums in float32 and applies both scales. A row is
quantised by its own largest value, so an outlier token or channel costs the others no accuracy. The weights of an FP8
checkpoint are taken as they are, with their one scale in every row.

Not multiplied in FP8 is what brings no speed: the modulations, whose input is one row. Their weights are kept in FP8
like the others, for the memory, and dequantised for each call. That is also what happens to all of them where the
device or this build of PyTorch cannot multiply FP8: the same weights, with activations in the model's own precision,
and no gain in speed. It is said once. A run on devices of both kinds would mix two slightly different renderings.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hv_batch.engine.dit.fp8_storage import FP8, FP8_MAX, Fp8Linear, block_linears

ALIGNMENT = 16  # both sides of a weight must be multiples of it for the CUDA kernel
MODULATIONS = ("img_mod.linear", "txt_mod.linear", "modulation.linear")

# Of an activation at a time: in 16 bits 32 MB, which stay in a GPU's L2 cache between being scaled and being rounded.
# Whole, the widest activation of 720p would be scaled in 4 GB of memory of its own.
CHUNK_ELEMENTS = 2**24


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] as (float8_e4m3fn [N, K], float32 scale [N, 1]), whose product is about `x`. Rows of zeros have scale 1.

    A scale is a bfloat16 number. Where `x` is bfloat16 too, it is divided in that precision: its 8 bits are rounded to
    4 right after.
    """
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    # Rounding the scale, and then the quotient, carries the largest value to at most 450, which the cast makes 448.
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0).bfloat16()
    divisor = scale if x.dtype is torch.bfloat16 else scale.float()
    quantised = torch.empty(x.shape, dtype=FP8, device=x.device)
    rows = max(1, CHUNK_ELEMENTS // x.shape[1])
    for target, source, by in zip(quantised.split(rows), x.split(rows), divisor.split(rows), strict=True):
        target.copy_(source / by)
    return quantised, scale.float()


class Fp8MatmulLinear(nn.Module):
    """A Linear with its weight in FP8 and a scale a row; `multiplies` says whether its products are FP8 as well.

    Built from a weight [out, in] in a wider precision, or in float8_e4m3fn with its `scale`, of one element or of one
    a row. Parameters are named as a Linear's are.
    """

    weight: nn.Parameter  # [out, in] float8_e4m3fn
    scale: Tensor  # [out, 1] float32
    bias: nn.Parameter | None  # [out]

    def __init__(self, weight: Tensor, bias: Tensor | None, *, scale: Tensor | None = None, multiplies: bool) -> None:
        super().__init__()
        if (weight.dtype == FP8) != (scale is not None):
            raise ValueError(f"a weight in {FP8} comes with a scale and no other does; this one is {weight.dtype}")
        if scale is None:
            weight, scale = quantise_rows(weight.detach().float())
        self.out_features, self.in_features = weight.shape
        self.multiplies = multiplies
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.register_buffer(
            "scale", scale.detach().float().reshape(-1, 1).repeat(self.out_features // scale.numel(), 1)
        )
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        if not self.multiplies:
            return F.linear(x, self._dequantised(x.dtype), self.bias)
        x_fp8, x_scale = quantise_rows(x.reshape(-1, self.in_features))
        # The CUDA kernel of row scales answers in bfloat16 only, and adds only a bias of that dtype.
        dtype = torch.bfloat16 if x.device.type == "cuda" else x.dtype
        fused = self.bias if x.dtype is dtype else None
        out = torch._scaled_mm(x_fp8, self.weight.t(), x_scale, self.scale.t(), bias=fused, out_dtype=dtype).to(x.dtype)
        if fused is None and self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        # The scale is no float16 number in general, and below that dtype's normal range for ordinary weights.
        wide = dtype if dtype is torch.bfloat16 else torch.float32
        return (self.weight.to(wide) * self.scale.to(wide)).to(dtype)


def multiply_in_fp8_(model: nn.Module, device: torch.device) -> None:
    """Put a `Fp8MatmulLinear` in the place of every Linear of the DiT's blocks, to compute on `device`.

    One after the other, so that weights are not held twice. Warns, once a process, if `device` cannot multiply FP8.
    """
    native = can_multiply(device)
    for name, linear in block_linears(model).items():
        aligned = all(side % ALIGNMENT == 0 for side in linear.weight.shape)
        scale = linear.scale if isinstance(linear, Fp8Linear) else None
        multiplies = native and aligned and not name.endswith(MODULATIONS)
        replacement = Fp8MatmulLinear(linear.weight, linear.bias, scale=scale, multiplies=multiplies)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)


@cache
def can_multiply(device: torch.device) -> bool:
    """Whether this device and build multiply FP8 with a scale a row, found out by doing it. If not, says so, once."""
    ones, scale = torch.ones(ALIGNMENT, ALIGNMENT, device=device), torch.ones(ALIGNMENT, 1, device=device)
    try:
        product = torch._scaled_mm(ones.to(FP8), ones.to(FP8).t(), scale, scale.t(), out_dtype=torch.bfloat16)
        return bool((product == ALIGNMENT).all())
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"fp8: matmul: {name} with PyTorch {torch.__version__} cannot multiply FP8 with a scale a row ({reason}). "
            "The weights stay in FP8 and are dequantised for each product, which saves the memory but no time. FP8 "
            "products need a GPU of compute capability 9.0 (Hopper) or later.",
            stacklevel=2,
        )
        return False
