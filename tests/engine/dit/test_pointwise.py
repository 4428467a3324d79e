"""The elementwise functions of the blocks: compiled, they compute the same, and no size compiles them again."""

from __future__ import annotations

import re

import pytest
import torch
from torch._dynamo.utils import counters

from hv_batch.architecture import DiTConfig
from hv_batch.engine import compiler
from hv_batch.engine.attention.flex_blocks import CUDA_BLOCK, check_backend
from hv_batch.engine.dit import pointwise
from hv_batch.engine.dit.pointwise import EAGER, compile_pointwise, compiled
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.protocol import UserError
from tests.support.dit_reference import random_dit, random_inputs

TINY = DiTConfig(
    hidden_size=48,
    heads_num=3,
    rope_dim_list=(4, 6, 6),
    mm_double_blocks_depth=2,
    mm_single_blocks_depth=2,
    text_states_dim=24,
    text_states_dim_2=12,
)
SIZES = [((3, 4, 6), [5]), ((1, 8, 4), [2, 9]), ((2, 6, 6), [1]), ((5, 4, 4), [7, 3])]


def velocity(model, size, lengths):
    return model(**random_inputs(TINY, size, lengths, seed=4, padded=max(lengths)))


def graphs():
    """The graphs that have been compiled in this process."""
    return counters["stats"]["unique_graphs"]


@pytest.fixture(params=["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def backend(request):
    """ "eager" traces and runs the same graphs without generating code, which takes a minute."""
    torch._dynamo.reset()
    compiled.cache_clear()
    return request.param


def test_no_size_and_no_text_is_compiled_again(backend):
    """Videos of other sizes, texts of other lengths and other models use the compiled code, which agrees with the eager
    functions to rounding.
    """
    plain, fused = random_dit(TINY, seed=3), random_dit(TINY, seed=3)
    compile_pointwise((*fused.double_blocks, *fused.single_blocks), backend)
    assert all(block.pointwise is not EAGER for block in (*fused.double_blocks, *fused.single_blocks))
    before = graphs()
    assert torch.allclose(velocity(fused, *SIZES[0]), velocity(plain, *SIZES[0]), rtol=1e-4, atol=1e-5)
    first = graphs()
    assert first > before
    other = random_dit(TINY, seed=8)
    compile_pointwise((*other.double_blocks, *other.single_blocks), backend)
    for size, lengths in SIZES[1:]:
        for model, reference in ((fused, plain), (other, random_dit(TINY, seed=8))):
            expected = velocity(reference, size, lengths)
            assert torch.allclose(velocity(model, size, lengths), expected, rtol=1e-4, atol=1e-5), (size, lengths)
    assert graphs() == first


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_precision_is_rounded_less_often():
    """The fused functions are at least as near to float32 as the eager ones."""
    exact = random_dit(TINY, seed=3)
    expected = velocity(exact, *SIZES[0])

    def error(model):
        return (velocity(model.to(torch.bfloat16), *SIZES[0]).float() - expected).norm() / expected.norm()

    fused = random_dit(TINY, seed=3)
    compile_pointwise((*fused.double_blocks, *fused.single_blocks))
    assert error(fused) <= 1.2 * error(random_dit(TINY, seed=3)) + 1e-3


def test_the_option_takes_true_or_false(tmp_path):
    with pytest.raises(UserError, match="fuse_pointwise: 'yes' is not allowed"):
        HunyuanVideo(model_base=tmp_path, fuse_pointwise="yes")


@pytest.mark.parametrize(("device", "needs"), [("cpu", "g++"), ("cuda", "triton")])
def test_a_machine_that_cannot_compile_is_refused(monkeypatch, device, needs):
    """P6: before the weights are read."""
    monkeypatch.setattr(compiler, "find_spec", lambda _name: None)
    monkeypatch.setattr(compiler.shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match=rf"fuse_pointwise needs .*{re.escape(needs)}"):
        pointwise.check_compiler(torch.device(device))
    with pytest.raises(UserError, match=rf"backend 'flex' needs .*{re.escape(needs)}"):
        check_backend("flex", CUDA_BLOCK, torch.device(device))
