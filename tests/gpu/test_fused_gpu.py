"""What is fused or converted on the device: elementwise work of the blocks, and frames before they are copied."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from hv_batch.architecture import DiTConfig
from hv_batch.engine.dit.pointwise import EAGER, compile_pointwise
from hv_batch.engine.vae.tiling import to_uint8
from tests.support.dit_reference import random_dit, random_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDE = DiTConfig(hidden_size=1024, heads_num=8, mm_double_blocks_depth=2, mm_single_blocks_depth=2, text_states_dim=64)


def test_fused_blocks_are_as_near_to_float32_and_compiled_once():
    """The error in bf16 is at most that of the eager functions, and other sizes and texts use the same code."""
    model = random_dit(WIDE, seed=1).cuda()
    blocks = (*model.double_blocks, *model.single_blocks)
    cases = [((3, 8, 8), [7]), ((5, 6, 10), [12, 1]), ((1, 16, 16), [31])]
    inputs = [
        {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        for given in (random_inputs(WIDE, size, lengths, seed=2, padded=32) for size, lengths in cases)
    ]
    exact = [model(**given).float() for given in inputs]
    model.bfloat16()

    def errors():
        results = [model(**given).float() for given in inputs]
        return [float((x - y).norm() / y.norm()) for x, y in zip(results, exact, strict=True)]

    eager = errors()
    compile_pointwise(blocks)
    model(**inputs[0])
    compiled = counters["stats"]["unique_graphs"]
    fused = errors()
    assert counters["stats"]["unique_graphs"] == compiled
    assert all(block.pointwise is not EAGER for block in blocks)
    for each, reference in zip(fused, eager, strict=True):
        assert each <= 1.2 * reference


def test_frames_are_copied_as_bytes():
    """Frames are converted on the device: what is copied to the host has one byte per value."""
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type == "cpu" and result.numel() > 1:
                copied.append(result.dtype)
            return result

    frames = torch.rand(1, 3, 5, 64, 48, device="cuda", dtype=torch.float16) * 2 - 1
    with Copies():
        out = to_uint8(frames)
    assert copied
    assert set(copied) == {torch.uint8}
    assert out.shape == (5, 64, 48, 3)
