"""Products in FP8 (`fp8: matmul`): row scales, real `torch._scaled_mm`, and the fallback without it."""

from __future__ import annotations

import copy
import logging
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.architecture import DiTConfig
from hv_batch.engine.checkpoint.loading import load_dit
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.dit import fp8_matmul
from hv_batch.engine.dit.fp8_matmul import MODULATIONS, Fp8MatmulLinear, can_multiply, multiply_in_fp8_, quantise_rows
from hv_batch.engine.dit.fp8_storage import FP8, Fp8Linear, block_linears
from hv_batch.engine.dit.offload import offload_blocks
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.protocol import ParallelPlan, RankSpec
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from hv_batch.weights.conversion import Recipe, convert
from tests.support.dit_reference import random_dit, random_inputs

CPU = torch.device("cpu")
TOY = DiTConfig(**TOY_DIT)

multiplying = pytest.mark.skipif(not can_multiply(CPU), reason="this build of PyTorch cannot multiply FP8 on a CPU")


@pytest.fixture
def unable(monkeypatch):
    """Make `torch._scaled_mm` fail, with an empty cache, as on a machine that cannot multiply FP8."""

    def refuse(*_args, **_kwargs):
        raise RuntimeError("torch._scaled_mm is only supported on devices with compute capability >= 9.0\nat line 1")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    can_multiply.cache_clear()
    yield
    can_multiply.cache_clear()


def fp8_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8MatmulLinear)}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 5),
    st.integers(1, 70),
    st.floats(-5, 3),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_row_is_within_half_a_step_of_its_own_scale(dtype, rows, columns, magnitude, seed):
    """e4m3 has 3 bits of mantissa: the error is 1/16 of a value or of the smallest normal number, in each row alone."""
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, columns, generator=draw) * 10**magnitude).to(dtype)
    x[0] *= 0
    quantised, scale = quantise_rows(x)
    assert quantised.dtype == FP8
    assert scale.shape == (rows, 1)
    assert torch.equal(scale, scale.bfloat16().float())
    error = (quantised.float() * scale - x.float()).abs()
    # For bfloat16, the quotient is rounded once more, by 1/512; values above 448 by the scale's rounding become 448.
    assert (error <= x.float().abs() / 16 * 1.1 + scale * 2**-10).all()
    alone, its_scale = quantise_rows(x[-1:])
    assert torch.equal(alone.view(torch.uint8), quantised[-1:].view(torch.uint8))
    assert torch.equal(its_scale, scale[-1:])


def test_long_activations_are_quantised_in_pieces(monkeypatch):
    """Memory: quantising in pieces gives the same bits; a row longer than a piece is one piece."""
    x = torch.randn(37, 24)
    whole, scale = quantise_rows(x)
    for elements in (1, 24 * 5, 24 * 37):
        monkeypatch.setattr(fp8_matmul, "CHUNK_ELEMENTS", elements)
        quantised, same = quantise_rows(x)
        assert torch.equal(quantised.view(torch.uint8), whole.view(torch.uint8))
        assert torch.equal(same, scale)


def test_values_that_are_not_finite_stay_so():
    """NaN and infinity must not become finite values."""
    x = torch.ones(3, 16)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    linear = Fp8MatmulLinear(torch.eye(16), None, multiplies=can_multiply(CPU))
    assert linear(x).isfinite().all(dim=1).tolist() == [False, False, True]


@multiplying
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_quantised_operands(dtype, tolerance, bias):
    """`_scaled_mm` equals a float64 product of the same operands; leading dimensions are kept."""
    torch.manual_seed(0)
    weight, b = torch.randn(48, 64), torch.randn(48) if bias else None
    linear = Fp8MatmulLinear(weight, None if b is None else b.to(dtype), multiplies=True)
    x = (torch.randn(3, 5, 64) * torch.logspace(-2, 2, 5)[:, None]).to(dtype)
    x_fp8, x_scale = quantise_rows(x.reshape(-1, 64))
    expected = (x_fp8.double() * x_scale) @ (linear.weight.double() * linear.scale).T
    expected += 0 if b is None else b.to(dtype).double()
    out = linear(x)
    assert out.dtype is dtype
    assert out.shape == (3, 5, 48)
    row_error = (out.double().reshape(-1, 48) - expected).norm(dim=1) / expected.norm(dim=1)
    assert row_error.max() <= tolerance


def test_dequantised_weights_are_the_same_numbers():
    """Without FP8 products, the weight is fp8 * scale, rounded once to the dtype of the input."""
    linear = Fp8MatmulLinear(torch.randn(32, 48) * 1e-3, torch.randn(32), multiplies=False)
    exact = linear.weight.double() * linear.scale
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.eye(48).to(dtype)
        assert torch.equal(linear._dequantised(dtype), exact.to(torch.float32).to(dtype))
        linear.bias.data = linear.bias.data.to(dtype)
        assert torch.equal(linear(x), linear._dequantised(dtype).T + linear.bias)


@multiplying
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float32, 0.06)])
def test_the_model_stays_close(dtype, tolerance):
    """Accuracy at toy width: the error of the velocity is at most 6 % of its norm, and not zero."""
    model = random_dit(TOY, seed=1).to(dtype)
    inputs = random_inputs(TOY, (3, 8, 8), [7], seed=2, padded=9)
    inputs["guidance"] = torch.tensor([6016.0])
    expected = model(**inputs)
    linears = set(block_linears(model))
    multiply_in_fp8_(model, CPU)
    replaced = fp8_modules(model)
    assert set(replaced) == linears
    assert {name for name, module in replaced.items() if not module.multiplies} == {
        name for name in linears if name.endswith(MODULATIONS)
    }
    velocity = model(**inputs)
    assert velocity.dtype is dtype
    error = relative(velocity, expected)
    print(f"relative error of the velocity: {error:.4f}")
    assert 1e-3 < error <= tolerance


def test_a_weight_takes_one_byte():
    """Memory: a Linear of a block takes 8 bits per element and 4 bytes per row."""
    linear = Fp8MatmulLinear(torch.randn(64, 256).bfloat16(), None, multiplies=True)
    assert sum(tensor.nbytes for tensor in linear.state_dict().values()) == 64 * 256 + 64 * 4


def test_a_machine_without_fp8_products_logs_one_warning(unable, caplog):
    """The warning names the reason and the consequence, once per process; the weights are dequantised."""
    model = random_dit(TOY, seed=1)
    inputs = random_inputs(TOY, (3, 8, 8), [7], seed=2, padded=9)
    expected = model(**inputs)
    other = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, logger="hv_batch.engine.dit.fp8_matmul"):
        multiply_in_fp8_(model, CPU)
        (message,) = caplog.messages
        assert re.search(r"cannot multiply FP8 .*compute capability >= 9\.0\)", message)
        assert "at line 1" not in message
        multiply_in_fp8_(other, CPU)
    assert caplog.messages == [message]
    assert not any(module.multiplies for module in fp8_modules(model).values())
    velocity = model(**inputs)
    assert torch.equal(velocity, other(**inputs))
    assert 1e-3 < relative(velocity, expected) <= 0.05


@multiplying
def test_narrow_linears_are_dequantised():
    """The CUDA kernel supports multiples of 16 only; a model of another width must not fail during a run."""
    config = DiTConfig(
        hidden_size=40,
        heads_num=2,
        rope_dim_list=(4, 8, 8),
        mm_double_blocks_depth=1,
        mm_single_blocks_depth=1,
        text_states_dim=16,
        text_states_dim_2=16,
    )
    model = random_dit(config, seed=1)
    inputs = random_inputs(config, (1, 4, 4), [3], seed=2, padded=4)
    expected = model(**inputs)
    multiply_in_fp8_(model, CPU)
    assert not any(module.multiplies for module in fp8_modules(model).values())
    assert relative(model(**inputs), expected) <= 0.1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The toy tree, and a tree whose DiT is FP8."""
    base = write_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    eight_bits = tmp_path_factory.mktemp("fp8") / "tree"
    shutil.copytree(base, eight_bits)
    transformers = eight_bits / "hunyuan-video-t2v-720p" / "transformers"
    convert(
        base / "hunyuan-video-t2v-720p" / "transformers" / "mp_rank_00_model_states.pt", transformers, Recipe(fp8=True)
    )
    (transformers / "mp_rank_00_model_states.pt").unlink()
    return base, CheckpointTree(eight_bits, dit_weight=transformers)


@multiplying
def test_weights_of_an_fp8_checkpoint_are_used_unchanged(checkpoints):
    """Spec section 6: nothing is quantised twice; the file's bytes are multiplied, with its scale in every row."""
    _, tree = checkpoints
    stored = load_dit(tree, TOY, "sdpa", torch.bfloat16, CPU, "storage")
    model = load_dit(tree, TOY, "sdpa", torch.bfloat16, CPU, "matmul")
    multiply_in_fp8_(model, CPU)
    for name, module in fp8_modules(model).items():
        source = stored.get_submodule(name)
        assert isinstance(source, Fp8Linear)
        assert torch.equal(module.weight.view(torch.uint8), source.weight.view(torch.uint8))
        assert torch.equal(module.scale, source.scale.float().expand_as(module.scale))


@multiplying
def test_the_engine_option_renders(checkpoints):
    """`fp8: matmul` from bf16 weights, through the engine: part of the identity (P3), and close to the run without."""
    base, _ = checkpoints
    spec = RankSpec(rank=0, local_rank=0, plan=ParallelPlan(), device="cpu", address="", timeout_s=0.0)
    engines = {fp8: HunyuanVideo(model_base=base, precision="bf16", fp8=fp8) for fp8 in ("none", "matmul")}
    assert engines["matmul"].check() == []
    assert engines["matmul"].identity()["fp8"] == "matmul"
    inputs = random_inputs(TOY, (2, 8, 8), [5], seed=3, padded=6)
    plain, eight_bits = (engine.join(spec)._model(**inputs) for engine in engines.values())
    assert not torch.equal(plain, eight_bits)
    assert relative(eight_bits, plain) <= 0.1


@multiplying
def test_streamed_weights_give_the_same_bits():
    """Offloaded blocks are streamed with their scales."""
    model = random_dit(TOY, seed=1)
    multiply_in_fp8_(model, CPU)
    inputs = random_inputs(TOY, (2, 8, 8), [5], seed=3, padded=6)
    expected = model(**inputs)
    offload_blocks(model, CPU, pinned=True)
    assert torch.equal(model(**inputs), expected)


def test_a_scale_without_fp8_weights_is_refused():
    """A scale without FP8 weights, or FP8 weights without a scale, raise ValueError."""
    with pytest.raises(ValueError, match="scale"):
        Fp8MatmulLinear(torch.randn(16, 16), None, scale=torch.tensor(1.0), multiplies=True)
    with pytest.raises(ValueError, match="scale"):
        Fp8MatmulLinear(torch.randn(16, 16).to(FP8), None, multiplies=True)
