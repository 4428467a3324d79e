"""8-bit attention: the error of the reference, its log-sum-exp, and the devices that the kernels need."""

from __future__ import annotations

import pytest
import torch

from hv_batch.attention_methods import QuantizedAttention, StepAttention
from hv_batch.engine.attention.kernels import attend_math, merge
from hv_batch.engine.attention.quantized import check_quantized, choose_quantized
from hv_batch.protocol import UserError
from tests.support.dit_reference import random_dit, random_inputs
from tests.support.trajectories import CONFIG, CPU

# The largest relative error against float32. FP8 scores are the coarser ones.
LIMITS = {"fp8": 4e-2, "int8": 2e-2}
FORMATS = sorted(LIMITS)


def kernel(qk):
    return choose_quantized(QuantizedAttention(qk=qk, backend="reference"))


def inputs(tokens=300):
    """q, k, v [L, 2, 64]. k has a mean that is larger than its deviation. v has a mean of 1: without any, a sum over
    many keys cancels, and the same rounding is a larger part of it.
    """
    q, k, v = torch.randn(3, tokens, 2, 64, generator=torch.Generator().manual_seed(0))
    return q, k + 4 * torch.randn(2, 64, generator=torch.Generator().manual_seed(1)), v + 1.0


def error(x, reference):
    return float((x - reference).norm() / reference.norm())


@pytest.mark.parametrize("qk", FORMATS)
def test_the_error_is_bounded(qk):
    """The relative error against float32 is bounded, also if k has a mean that is larger than its deviation."""
    q, k, v = inputs()
    out, lse = kernel(qk)(q, k, v)
    expected, expected_lse = attend_math(q, k, v)
    assert 1e-4 < error(out, expected) < LIMITS[qk]
    assert (lse - expected_lse).abs().max().item() < 5e-2


@pytest.mark.parametrize("qk", FORMATS)
def test_partial_results_merge(qk):
    """The log-sum-exp holds the subtracted mean of k, so the parts of a ring, with means of their own, merge."""
    q, k, v = inputs()
    expected, _ = attend_math(q, k, v)
    (first, first_lse), second = (kernel(qk)(q, k[rows], v[rows]) for rows in (slice(0, 90), slice(90, None)))
    merged, _ = merge(first.float(), first_lse, *second)
    assert error(merged, expected) < LIMITS[qk]


@pytest.mark.parametrize("qk", FORMATS)
def test_the_model_computes_in_8_bits(qk):
    """The velocity of a random DiT changes by less than the limit (relative RMS)."""
    model, given = random_dit(CONFIG, seed=1), random_inputs(CONFIG, (3, 10, 14), [7, 2], seed=2, padded=9)
    dense = model(**given)
    quantized = model(**given, attention=StepAttention(quantized=QuantizedAttention(qk=qk, backend="reference")))
    assert 1e-5 < error(quantized, dense) < LIMITS[qk]


def test_equal_keys_and_zeros_are_finite():
    """A range of zero does not divide by zero: all keys equal their mean, and all values are 0."""
    for qk in FORMATS:
        q, k, v = torch.zeros(3, 9, 1, 8) + 1.0
        out, _ = kernel(qk)(q, k, torch.zeros_like(v))
        assert torch.equal(out, torch.zeros_like(v))


@pytest.mark.parametrize(("qk", "backend"), [("fp8", "fa3"), ("int8", "sage")])
def test_a_kernel_that_cannot_run_is_refused(qk, backend):
    """P6: a CPU has no 8-bit kernel; the error names the reason and the reference."""
    with pytest.raises(UserError, match=r"needs .* but this process has cpu.*backend 'reference'"):
        check_quantized(QuantizedAttention(qk=qk, backend=backend), CPU, torch.bfloat16)
    check_quantized(QuantizedAttention(qk=qk, backend="reference"), CPU, torch.float32)
