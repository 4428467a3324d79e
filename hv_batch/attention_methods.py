"""Attention methods that save work and change pixels: their options, and the steps that use them. Without torch.

The engine computes with these options, and the cost model counts their work. `hv_batch.engine.attention` has the
kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hv_batch.protocol import UserError

MAX_BRICK = 1024  # tokens

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and the allowed values


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
        return 1.0 if step < first_steps(self.dense_until, steps) else self.density

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, for the identity of a run."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return values | {"brick": list(self.brick)}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedAttention:
    """8-bit attention (engine option `quantized_attention`). All fields change pixels.

    - `qk`: the format in which q and k are multiplied, "int8" or "fp8". The probabilities and v are multiplied in FP8.
    - `backend`: the kernel. "sage" (package sageattention, int8), "fa3" (package flash_attn_3, fp8), or "reference"
      (both formats on any device; slow, for tests).
    - `exact_until`: the fraction of the steps, rounded up, that keep the model's precision. The last step keeps it too.
    """

    qk: str
    backend: str
    exact_until: float = 0.1

    def is_used_at(self, step: int, steps: int) -> bool:
        """Return whether step number `step` (from 0) of `steps` computes in 8 bits."""
        return first_steps(self.exact_until, steps) <= step < steps - 1

    def to_json(self) -> dict[str, Any]:
        """Return all fields, for the identity of a run."""
        return asdict(self)


def first_steps(fraction: float, steps: int) -> int:
    """Return the number of steps in the first `fraction` of `steps`, rounded up."""
    return math.ceil(round(fraction * steps, 6))  # rounded first, because 0.1 * 30 is above 3


@dataclass(frozen=True, slots=True)
class StepAttention:
    """The methods that one step uses. The default is dense attention in the model's precision. At most one is set."""

    sparse: SparseAttention | None = None
    quantized: QuantizedAttention | None = None


DENSE = StepAttention()


@dataclass(frozen=True, slots=True)
class AttentionMethods:
    """The methods that a video uses. Raises UserError if there are two, for which no kernel exists."""

    sparse: SparseAttention | None = None
    quantized: QuantizedAttention | None = None

    def __post_init__(self) -> None:
        if self.sparse and self.quantized:
            raise UserError(
                "engine options sparse_attention and quantized_attention: no kernel combines them. Remove one; sparse "
                "attention saves more."
            )

    def at(self, step: int, steps: int) -> StepAttention:
        """Return the methods of step number `step` (from 0) of `steps`."""
        if self.sparse and self.sparse.density_at(step, steps) < 1.0:
            return StepAttention(sparse=self.sparse)
        if self.quantized and self.quantized.is_used_at(step, steps):
            return StepAttention(quantized=self.quantized)
        return DENSE

    def density(self, step: int, steps: int) -> float:
        """The fraction of the attention's operations that step number `step` (from 0) of `steps` computes."""
        return self.sparse.density_at(step, steps) if self.sparse else 1.0


ALL_DENSE = AttentionMethods()


def parse_attention_methods(sparse: Any, quantized: Any) -> AttentionMethods:
    """Return the methods of the engine options `sparse_attention` and `quantized_attention`.

    Raises UserError if one of them is not allowed, or if both are set.
    """
    return AttentionMethods(parse_sparse_attention(sparse), parse_quantized_attention(quantized))


def parse_sparse_attention(options: Any) -> SparseAttention | None:
    """Return the checked value of the engine option `sparse_attention`; None if it is not set.

    Raises UserError that names the field, its value and the allowed values.
    """
    option = "engine option sparse_attention"
    values = _checked_fields(option, SparseAttention, options, {"density": 0.25}, SPARSE_RULES)
    return None if values is None else SparseAttention(**values)


def parse_quantized_attention(options: Any) -> QuantizedAttention | None:
    """Return the checked value of the engine option `quantized_attention`; None if it is not set.

    Raises UserError that names the field, its value and the allowed values.
    """
    option = "engine option quantized_attention"
    values = _checked_fields(option, QuantizedAttention, options, {"qk": "int8"}, QUANTIZED_RULES)
    if values is None:
        return None
    backends = QUANTIZED_BACKENDS[values["qk"]]
    parsed = QuantizedAttention(**{"backend": backends[0], **values})
    if parsed.backend not in backends:
        raise UserError(
            f"{option}: backend is {parsed.backend!r}; allowed with qk {parsed.qk} is {', '.join(backends)}."
        )
    return parsed


def _checked_fields(
    option: str, method: type, options: Any, example: Mapping[str, Any], rules: Mapping[str, Rule]
) -> dict[str, Any] | None:
    """Return the untrusted fields of `method`, lists as tuples. `example` has the field that must be given."""
    if options is None:
        return None
    [(required, value)] = example.items()
    names = [field.name for field in fields(method)]
    if not isinstance(options, Mapping) or required not in options or not set(options) <= set(names):
        others = ", ".join(name for name in names if name != required)
        raise UserError(
            f"{option}: {options!r} is not allowed; give a mapping with {required}, such as {{{required}: {value}}}, "
            f"and optionally {others}."
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for name, value in values.items():
        is_allowed, allowed = rules[name]
        if not is_allowed(value):
            raise UserError(f"{option}: {name} is {value!r}; allowed is {allowed}.")
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_brick(value: Any) -> bool:
    sides = value if isinstance(value, tuple) else ()
    is_whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    return len(sides) == 3 and is_whole and math.prod(sides) <= MAX_BRICK


def _one_of(*choices: str) -> Rule:
    return (lambda value: isinstance(value, str) and value in choices), ", ".join(choices)


FRACTION: Rule = (_is_fraction, "a number of at least 0 and below 1")
SPARSE_RULES: Mapping[str, Rule] = {
    "density": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "top_p": (
        lambda value: value is None or (_is_number(value) and 0 < value < 1),
        "a number above 0 and below 1",
    ),
    "brick": (_is_brick, f"a list of three whole numbers [t, h, w] with a product of at most {MAX_BRICK}"),
    "neighbours": _one_of("all", "faces", "none"),
    "dense_until": FRACTION,
    "backend": _one_of("flex", "flex-flash", "eager"),
}
# The first backend is the default.
QUANTIZED_BACKENDS: Mapping[str, tuple[str, ...]] = {"int8": ("sage", "reference"), "fp8": ("fa3", "reference")}
QUANTIZED_RULES: Mapping[str, Rule] = {
    "qk": _one_of(*QUANTIZED_BACKENDS),
    "backend": _one_of("sage", "fa3", "reference"),
    "exact_until": FRACTION,
}
