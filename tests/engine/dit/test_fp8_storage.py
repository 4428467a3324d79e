"""FP8 weights as released: kept in 8 bits, dequantised in the released order."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.architecture import DiTConfig
from hv_batch.engine.checkpoint.digests import revision
from hv_batch.engine.checkpoint.loading import load_dit, verify
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.dit.fp8_storage import FP8, Fp8Linear, block_linears, quantise
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from tests.support.dit_reference import random_inputs

CPU = torch.device("cpu")
CONFIG = DiTConfig(**TOY_DIT)
TRANSFORMERS = "hunyuan-video-t2v-720p/transformers"
DIT = f"{TRANSFORMERS}/mp_rank_00_model_states.pt"
DIT_FP8 = f"{TRANSFORMERS}/mp_rank_00_model_states_fp8.pt"
MAP = f"{TRANSFORMERS}/mp_rank_00_model_states_fp8_map.pt"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy tree with FP8 weights and their map beside the bf16 weights, as released. Tests must not modify it."""
    base = write_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    state = torch.load(base / DIT, weights_only=True)["module"]
    scales = {}
    for name, tensor in state.items():
        if name.startswith(("double_blocks.", "single_blocks.")) and name.endswith(".weight") and tensor.dim() == 2:
            scale = tensor.float().abs().max() / 448
            state[name] = (tensor.float() / scale).to(FP8)
            scales[name.removesuffix(".weight")] = scale
    torch.save({"module": state}, base / DIT_FP8)
    torch.save(scales, base / MAP)
    return base


@pytest.fixture
def base(toy, tmp_path):
    return shutil.copytree(toy, tmp_path / "ckpts")


def tree(base):
    return CheckpointTree(base, dit_weight=base / DIT_FP8)


def load(base, dtype, fp8):
    return load_dit(tree(base), CONFIG, "sdpa", dtype, CPU, fp8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_dequantised_as_released(toy, dtype):
    """Spec section 6: weight and scale are both rounded to the model's dtype, then multiplied."""
    state = torch.load(toy / DIT_FP8, weights_only=True)["module"]
    scales = torch.load(toy / MAP, weights_only=True)
    held, plain = load(toy, dtype, "storage"), load(toy, dtype, "none").state_dict()
    assert set(block_linears(held)) == set(scales)
    draw = torch.Generator().manual_seed(0)
    for name, linear in block_linears(held).items():
        assert isinstance(linear, Fp8Linear)
        assert torch.equal(linear.weight.view(torch.uint8), state[f"{name}.weight"].view(torch.uint8))
        released = state[f"{name}.weight"].to(dtype) * scales[name].to(dtype).expand(linear.weight.shape)
        assert torch.equal(plain[f"{name}.weight"], released)
        x = torch.randn(3, linear.in_features, generator=draw).to(dtype)
        assert torch.equal(linear(x), F.linear(x, released, state[f"{name}.bias"].to(dtype)))


def test_held_and_dequantised_weights_render_the_same_bits(toy):
    """P3: modes "storage" and "none" give equal pixels. FP8 is close to bf16, which shows that the scales are right."""
    inputs = random_inputs(CONFIG, (2, 4, 6), [7], seed=3, padded=9)
    held, plain = (load(toy, torch.bfloat16, mode)(**inputs) for mode in ("storage", "none"))
    assert torch.equal(held, plain)
    full = load_dit(CheckpointTree(toy), CONFIG, "sdpa", torch.bfloat16, CPU)(**inputs)
    assert 0 < (held - full).norm() / full.norm() < 0.1


def test_held_weights_take_half_the_memory(toy):
    """Spec section 6: the Linears of the blocks take one byte per element; all other dtypes are unchanged."""
    held, full = load(toy, torch.bfloat16, "storage"), load(toy, torch.bfloat16, "none")
    names = {f"{name}.weight" for name in block_linears(full)}
    assert {name for name, p in held.named_parameters() if p.dtype == FP8} == names
    assert {p.dtype for name, p in held.named_parameters() if name not in names} == {torch.bfloat16}
    assert held.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in held.parameters())


def test_fp8_weights_without_their_map_are_refused(base):
    """P6: FP8 weights without scales would render noise, so they are refused."""
    (base / MAP).unlink()
    (message,) = verify(tree(base), CONFIG)
    assert "8-bit weights (such as double_blocks.0." in message
    assert str(base / MAP) in message
    with pytest.raises(UserError, match="which does not exist"):
        load(base, torch.float32, "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.pop("single_blocks.1.linear2"),
            "lacks the scales of single_blocks.1.linear2, so it is not the map",
        ),
        (
            lambda m: m.update({"single_blocks.1.linear2": torch.ones(2)}),
            "one number per module, but single_blocks.1.linear2",
        ),
        (lambda m: m.update({"x": "y"}), "must contain tensors by name"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(base, change, message):
    """P6: the error names the module, before any tensor is read."""
    scales = torch.load(base / MAP, weights_only=True)
    change(scales)
    torch.save(scales, base / MAP)
    (sentence,) = verify(tree(base), CONFIG, "storage")
    assert message in sentence
    assert str(base / MAP) in sentence


def test_8_bit_weights_elsewhere_are_refused(base):
    """Spec section 6: only Linears of the blocks may be FP8; an FP8 convolution is refused."""
    content = torch.load(base / DIT_FP8, weights_only=True)
    content["module"]["img_in.proj.weight"] = content["module"]["img_in.proj.weight"].to(FP8)
    torch.save(content, base / DIT_FP8)
    torch.save(torch.load(base / MAP, weights_only=True) | {"img_in.proj": torch.ones(())}, base / MAP)
    (sentence,) = verify(tree(base), CONFIG)
    assert "8-bit weights that are not 8-bit in the release: img_in.proj" in sentence


def test_storage_needs_fp8_weights(toy):
    """P6: `fp8: storage` without FP8 weights is an error, not a silent fallback."""
    (sentence,) = verify(CheckpointTree(toy), CONFIG, "storage")
    assert "contains no FP8 weights" in sentence
    with pytest.raises(UserError, match="fp8: 'fp4' is not allowed; allowed are none, storage"):
        HunyuanVideo(model_base=toy, fp8="fp4")


def test_the_map_belongs_to_the_revision(toy, base):
    """P2, P3: other scales change the revision."""
    assert revision(tree(base)) == revision(tree(toy))
    torch.save({name: s * 2 for name, s in torch.load(base / MAP, weights_only=True).items()}, base / MAP)
    assert revision(tree(base)) != revision(tree(toy))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), st.sampled_from([1.0, 1e-3, 1e-20, 3e38]))
def test_quantising_takes_the_nearest_representable_number(values, unit):
    """The scale is a bf16 number, no weight is clipped, and rounding is to nearest."""
    weight = torch.tensor(values).clamp(-1, 1).reshape(1, -1) * unit
    quantised, scale = quantise(weight)
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.isfinite(quantised.float()).all()
    assert (weight.abs() <= 448 * scale * (1 + 1e-6)).all()  # nothing is clipped
    representable = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    representable = representable[representable.isfinite()].unique()
    wanted = weight / scale
    best = (wanted.reshape(-1, 1) - representable).abs().min(dim=1).values.reshape(weight.shape)
    assert torch.allclose((quantised.float() - wanted).abs(), best, rtol=1e-6, atol=0)


def test_a_matrix_of_zeros_stays_zero():
    """A matrix of zeros causes no division by zero: an untrained gate is zero."""
    quantised, scale = quantise(torch.zeros(2, 3))
    assert torch.equal(quantised.float() * scale, torch.zeros(2, 3))
