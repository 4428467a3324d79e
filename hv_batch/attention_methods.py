"""Attention methods that save work and change pixels: their options, and the steps that use them. Without torch.

The engine computes with these options, and the cost model counts their work. `hv_batch.engine.attention` has the
kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hv_batch.protocol import UserError

BACKENDS = ("flex", "flex-flash", "eager")
NEIGHBOURS = ("all", "faces", "none")
MAX_BRICK = 1024  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseAttention:
    """Block-sparse attention of the image tokens (engine option `sparse_attention`). All fields change pixels.

    - `density`: the fraction of key blocks that each query block attends to, separately chosen for each head.
    - `top_p`: if it is set, a query block also keeps its most probable key blocks up to this estimated probability, so
      `density` is a lower bound.
    - `brick`: tokens of a block along t, h and w. CUDA kernels need blocks of 128 tokens or a multiple.
    - `neighbours`: the blocks that are always kept besides the block itself: "all" blocks that touch it (26 in the
      middle of a video), those that touch it with a face ("faces", 6), or "none".
    - `dense_until`: the fraction of the steps, rounded up, that are dense. The first steps determine the layout.
    - `backend`: "flex" (compiled `flex_attention`), "flex-flash" (the same with FlashAttention-4's kernels), or "eager"
      (a slow reference without compilation). They round differently.
    """

    density: float
    top_p: float | None = None
    brick: tuple[int, int, int] = (4, 4, 8)
    neighbours: str = "all"
    dense_until: float = 0.2
    backend: str = "flex"

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return math.prod(self.brick)

    def density_at(self, step: int, steps: int) -> float:
        """The fraction of the image attention that step number `step` (from 0) of `steps` computes, at least."""
        # Rounded first, because 0.1 * 30 is above 3.
        return 1.0 if step < math.ceil(round(self.dense_until * steps, 6)) else self.density

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, for the identity of a run."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return values | {"brick": list(self.brick)}


@dataclass(frozen=True, slots=True)
class StepAttention:
    """The methods that one step uses. The default is dense attention in the model's precision."""

    sparse: SparseAttention | None = None


DENSE = StepAttention()


@dataclass(frozen=True, slots=True)
class AttentionMethods:
    """The methods that a video uses."""

    sparse: SparseAttention | None = None

    def at(self, step: int, steps: int) -> StepAttention:
        """Return the methods of step number `step` (from 0) of `steps`."""
        if self.sparse and self.sparse.density_at(step, steps) < 1.0:
            return StepAttention(self.sparse)
        return DENSE

    def density(self, step: int, steps: int) -> float:
        """The fraction of the attention's operations that step number `step` (from 0) of `steps` computes."""
        return self.sparse.density_at(step, steps) if self.sparse else 1.0


ALL_DENSE = AttentionMethods()


def parse_sparse_attention(options: Any) -> SparseAttention | None:
    """Return the checked value of the engine option `sparse_attention`; None if it is not set.

    Raises UserError that names the field, its value and the allowed values.
    """
    if options is None:
        return None
    option = "engine option sparse_attention"
    names = [field.name for field in fields(SparseAttention)]
    if not isinstance(options, Mapping) or "density" not in options or not set(options) <= set(names):
        raise UserError(
            f"{option}: {options!r} is not allowed; give a mapping with density, such as {{density: 0.25}}, and "
            f"optionally {', '.join(names[1:])}."
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    for name, value in values.items():
        if allowed := _find_fault(name, value):
            raise UserError(f"{option}: {name} is {value!r}; allowed is {allowed}.")
    return SparseAttention(**values)


def _find_fault(name: str, value: Any) -> str | None:
    """Return the allowed values of field `name` of `SparseAttention` if `value` is not one of them."""
    match name:
        case "density":
            return None if _is_number(value) and 0 < value <= 1 else "a number above 0 and at most 1"
        case "top_p":
            fits = value is None or (_is_number(value) and 0 < value < 1)
            return None if fits else "a number above 0 and below 1"
        case "dense_until":
            return None if _is_number(value) and 0 <= value < 1 else "a number of at least 0 and below 1"
        case "brick":
            sides = value if isinstance(value, tuple) else ()
            fits = len(sides) == 3 and all(isinstance(side, int) and side > 0 for side in sides)
            fits = fits and not any(isinstance(side, bool) for side in sides) and math.prod(sides) <= MAX_BRICK
            return None if fits else f"a list of three whole numbers [t, h, w] with a product of at most {MAX_BRICK}"
        case _:
            choices = {"neighbours": NEIGHBOURS, "backend": BACKENDS}[name]
            return None if value in list(choices) else ", ".join(choices)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
