"""FP8 products on a GPU: the row-scaled kernel against a float32 product of the same operands, and a whole model."""

from __future__ import annotations

import pytest
import torch

from hv_batch.architecture import DiTConfig
from hv_batch.engine.dit.fp8_matmul import Fp8MatmulLinear, can_multiply, multiply_in_fp8_, quantise_rows
from hv_batch.engine.dit.model import HYVideoDiT
from tests.support.dit_reference import random_dit, random_inputs

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not can_multiply(torch.device("cuda")), reason="needs a GPU that multiplies FP8"
)

WIDE = DiTConfig(hidden_size=1024, heads_num=8, mm_double_blocks_depth=2, mm_single_blocks_depth=4, text_states_dim=256)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 8e-3), (torch.float32, 8e-3)])
@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
def test_the_product_is_that_of_the_quantised_operands(dtype, tolerance, rows):
    """The product is right for any number of tokens and any precision; the kernel outputs bfloat16, hence the bound."""
    torch.manual_seed(0)
    weight, bias = torch.randn(512, 768, device="cuda"), torch.randn(512, device="cuda").to(dtype)
    linear = Fp8MatmulLinear(weight, bias, multiplies=True)
    x = torch.randn(rows, 768, device="cuda").to(dtype)
    x_fp8, x_scale = quantise_rows(x)
    expected = (x_fp8.float() * x_scale) @ (linear.weight.float() * linear.scale).T + bias.float()
    out = linear(x)
    assert out.dtype is dtype
    assert ((out.float() - expected).norm() / expected.norm()).item() <= tolerance


def test_the_model_stays_close():
    """FP8 products are close to bf16 at width 1024, and the weights of the blocks take half the memory."""
    model: HYVideoDiT = random_dit(WIDE, seed=1).to("cuda", torch.bfloat16)
    inputs = random_inputs(WIDE, (5, 16, 16), [40], seed=2, padded=64)
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    expected, before = model(**inputs), torch.cuda.memory_allocated()
    multiply_in_fp8_(model, torch.device("cuda"))
    assert torch.cuda.memory_allocated() < 0.7 * before
    velocity = model(**inputs)
    assert 1e-3 < ((velocity - expected).float().norm() / expected.float().norm()).item() <= 0.08
    assert torch.equal(velocity, model(**inputs))
