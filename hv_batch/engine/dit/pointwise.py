"""The elementwise work of the blocks between their matrix products: norms, modulation, rotation, gates.

With `compile_pointwise`, torch.compile fuses each function into one kernel or two, so that activations are read and
written once. Results are rounded less often, so they differ in the last bits. Sizes are dynamic: videos of another size
and texts of another length use the same compiled code. Gate and residual are one kernel already (`addcmul`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hv_batch.engine.compiler import missing_compiler
from hv_batch.protocol import UserError

NORM_EPS = 1e-6
MIN_ROWS = 2  # of a compiled call; a text may have one row


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm without weights, then scale and shift, in float32. Returns x's dtype."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    return normed.mul_(1 + scale).add_(shift).to(x.dtype)


def rotate_(x: Tensor, rope: Tensor) -> None:
    """Rotate each channel pair of x [L, ..., D] by the angle of its token, in place, as a complex product.

    rope [L, D / 2] is complex64 with modulus 1; see `embeddings.rope_table`.
    """
    wide = x.float()  # x itself if it is float32
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    pairs.mul_(rope.view(len(rope), *[1] * (x.dim() - 2), -1))
    if wide is not x:
        x.copy_(wide)


def normalize_(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> None:
    """Normalise q and k of qkv [L, 3, H, D] in place. Rounds after the normalisation and again after the weight."""
    qk = qkv[:, :2]
    length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=torch.float32)
    qk.mul_(torch.rsqrt(length.square_().div_(qk.shape[-1]).add_(NORM_EPS)))
    qk.mul_(torch.stack((q_weight, k_weight)).unsqueeze(1))


def normalize_rotate_(qkv: Tensor, text_len: int, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> None:
    """Normalise q and k of qkv [L, 3, H, D], and rotate those after the first `text_len` rows, in place."""
    normalize_(qkv, q_weight, k_weight)
    rotate_(qkv[text_len:, :2], rope)


@dataclass(frozen=True, slots=True)
class Pointwise:
    """One implementation of these functions."""

    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    normalize_: Callable[[Tensor, Tensor, Tensor], None]
    normalize_rotate_: Callable[[Tensor, int, Tensor, Tensor, Tensor], None]


EAGER = Pointwise(modulate, normalize_, normalize_rotate_)


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile cannot generate code for `device`."""
    if missing := missing_compiler(device):
        raise UserError(
            f"engine option fuse_pointwise needs {missing}, which this machine lacks; install it, or set it to false."
        )


def compile_pointwise(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Let these blocks use compiled functions. Each is compiled at its first call, in about 10 s."""
    for block in blocks:
        setattr(block, "pointwise", compiled(backend))  # noqa: B010  # which mypy takes for a parameter


@cache
def compiled(backend: str = "inductor") -> Pointwise:
    """The compiled functions, which all models of this process share, so that each is compiled once."""

    def fused(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    modulated, normalized, rotated = fused(modulate), fused(_normalize), fused(_normalize_rotate)

    # The compiler adds conditions to its code, and compiles it again where they do not hold: for a single row, for the
    # place of a view in its tensor (`clone`), and for the size of the tensor behind a view (`data`).
    def modulate_rows(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if len(x) < MIN_ROWS:
            return modulate(x, shift, scale)
        rows: Tensor = modulated(x, shift.clone(), scale.clone())
        return rows

    def normalize_rows_(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> None:
        if len(qkv) < MIN_ROWS:
            normalize_(qkv, q_weight, k_weight)
        else:
            normalized(qkv[:, :2].data, q_weight, k_weight)

    def normalize_rotate_rows_(qkv: Tensor, text_len: int, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> None:
        if text_len:
            normalize_rows_(qkv[:text_len], q_weight, k_weight)
        image = qkv[text_len:]
        if len(image) < MIN_ROWS:
            normalize_rotate_(image, 0, q_weight, k_weight, rope)
        else:  # the compiler generates no code for complex numbers
            rotated(image[:, :2].data, q_weight, k_weight, torch.view_as_real(rope).data)

    return Pointwise(modulate_rows, normalize_rows_, normalize_rotate_rows_)


def _normalized(qk: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """qk [L, 2, H, D] normalised, in float32."""
    wide = qk.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return wide * torch.stack((q_weight, k_weight)).unsqueeze(1).float()


def _normalize(qk: Tensor, q_weight: Tensor, k_weight: Tensor) -> None:
    qk.copy_(_normalized(qk, q_weight, k_weight))


def _normalize_rotate(qk: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> None:
    """As `normalize_rotate_` without text, with the real and imaginary parts of rope [L, D / 2, 2]."""
    pairs = _normalized(qk, q_weight, k_weight).unflatten(-1, (-1, 2))
    cos, sin = (rope[:, None, None, :, part] for part in (0, 1))
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    qk.copy_(rotated.flatten(-2))
