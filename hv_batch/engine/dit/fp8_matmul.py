"""Matrix products in FP8 for the Linears of the DiT's blocks (engine option `fp8: matmul`).

A weight is quantised once, with one scale per row (output channel); an activation is quantised on every call, with one
scale per row (token). Both become float8_e4m3fn. `torch._scaled_mm` multiplies them, accumulates in float32 and applies
both scales. The scale of a row depends only on its own largest value, so an outlier token or channel does not reduce
the accuracy of the others. The weights of an FP8 checkpoint are used unchanged, with their single scale in every row.

The modulations are not multiplied in FP8, because their input is one row and FP8 gains no speed there. Their weights
are stored in FP8 to save memory and dequantised on each call. All Linears work in this way if the device or the build
of PyTorch cannot multiply FP8: the weights are the same, the activations keep the model's precision, and there is no
gain in speed. This is logged once per process. A run on devices of both kinds would mix two slightly different results.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hv_batch.engine.dit.fp8_storage import FP8, FP8_MAX, Fp8Linear, block_linears

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # the CUDA kernel requires both sides of a weight to be multiples of this
MODULATIONS = ("img_mod.linear", "txt_mod.linear", "modulation.linear")

# Elements of an activation that are quantised at a time: 32 MB in 16 bits, which stay in a GPU's L2 cache between
# scaling and rounding. Scaling the widest activation of 720p as a whole would need 4 GB of extra memory.
CHUNK_ELEMENTS = 2**24


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [N, K] to (float8_e4m3fn [N, K], float32 scale [N, 1]). Their product approximates x.

    Scales are bfloat16 numbers. A row of zeros has scale 1. If x is bfloat16, the division is bfloat16 as well, because
    its 8 bits are rounded to 4 directly afterwards.
    """
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    # Rounding of the scale and of the quotient raises the largest value to at most 450, which the cast rounds to 448.
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0).bfloat16()
    divisor = scale if x.dtype is torch.bfloat16 else scale.float()
    quantised = torch.empty(x.shape, dtype=FP8, device=x.device)
    rows = max(1, CHUNK_ELEMENTS // x.shape[1])
    for target, source, by in zip(quantised.split(rows), x.split(rows), divisor.split(rows), strict=True):
        target.copy_(source / by)
    return quantised, scale.float()


class Fp8MatmulLinear(nn.Module):
    """A Linear with an FP8 weight and one scale per row. `multiplies` selects FP8 products; otherwise it dequantises.

    Built from a weight [out, in] in a wider precision, or from a float8_e4m3fn weight with its `scale`, which has one
    element or one per row. The parameters have the names of a Linear. Raises ValueError if only one of FP8 weight and
    scale is given.
    """

    weight: nn.Parameter  # [out, in] float8_e4m3fn
    scale: Tensor  # [out, 1] float32
    bias: nn.Parameter | None  # [out]

    def __init__(self, weight: Tensor, bias: Tensor | None, *, scale: Tensor | None = None, multiplies: bool) -> None:
        super().__init__()
        if (weight.dtype == FP8) != (scale is not None):
            raise ValueError(f"a scale must be given if and only if the weight is {FP8}; the weight is {weight.dtype}")
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
        """Map x [..., in] to [..., out] in x's dtype."""
        if not self.multiplies:
            return F.linear(x, self._dequantised(x.dtype), self.bias)
        x_fp8, x_scale = quantise_rows(x.reshape(-1, self.in_features))
        # The CUDA kernel with row scales outputs bfloat16 only and supports only a bias of that dtype.
        dtype = torch.bfloat16 if x.device.type == "cuda" else x.dtype
        fused = self.bias if x.dtype is dtype else None
        out = torch._scaled_mm(x_fp8, self.weight.t(), x_scale, self.scale.t(), bias=fused, out_dtype=dtype).to(x.dtype)
        if fused is None and self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        # The scale is usually not a float16 number, and for common weights it is below the normal range of float16.
        wide = dtype if dtype is torch.bfloat16 else torch.float32
        return (self.weight.to(wide) * self.scale.to(wide)).to(dtype)


def multiply_in_fp8_(model: nn.Module, device: torch.device) -> None:
    """Replace every Linear of the DiT's blocks by an `Fp8MatmulLinear` that computes on `device`.

    The Linears are replaced one by one, so that the weights are not held twice. Logs a warning, once per process, if
    `device` cannot multiply FP8.
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
    """Return whether this device and build of PyTorch multiply FP8 with row scales, by a trial product.

    Logs a warning if they do not. The result is cached, so the warning is logged once per process.
    """
    ones, scale = torch.ones(ALIGNMENT, ALIGNMENT, device=device), torch.ones(ALIGNMENT, 1, device=device)
    try:
        product = torch._scaled_mm(ones.to(FP8), ones.to(FP8).t(), scale, scale.t(), out_dtype=torch.bfloat16)
        return bool((product == ALIGNMENT).all())
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        reason = str(error).partition("\n")[0]
        logger.warning(
            "fp8: matmul: %s with PyTorch %s cannot multiply FP8 with row scales (%s). The weights stay in FP8 and are "
            "dequantised for each product, which saves memory but no time. FP8 products need a GPU of compute "
            "capability 9.0 (Hopper) or later.",
            name,
            torch.__version__,
            reason,
        )
        return False
