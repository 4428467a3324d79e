"""Loading onto a GPU: tensor by tensor from the page cache, with FP8 weights stored in 8 bits or dequantised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hv_batch.architecture import DiTConfig
from hv_batch.engine.checkpoint.loading import load_dit
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.dit.fp8_storage import block_linears
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.weights.conversion import Recipe, convert
from tests.support.dit_reference import random_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = DiTConfig(
    hidden_size=1024, heads_num=8, mm_double_blocks_depth=3, mm_single_blocks_depth=7, text_states_dim=1024
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """500 MB of bf16 weights as .pt, and the same weights as FP8 safetensors."""
    root = tmp_path_factory.mktemp("weights")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in HYVideoDiT(CONFIG).state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    state = {name: (torch.randn(shape, generator=draw) * 0.02).bfloat16() for name, shape in shapes.items()}
    torch.save({"module": state}, root / "mp_rank_00_model_states.pt")
    convert(root / "mp_rank_00_model_states.pt", root / "fp8", Recipe(fp8=True))
    return root


def load(folder, weights, device, fp8="none"):
    return load_dit(
        CheckpointTree(folder, dit_weight=folder / weights), CONFIG, "sdpa", torch.bfloat16, torch.device(device), fp8
    )


def anonymous():
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def test_loading_needs_no_host_memory(folder):
    """The host memory of a rank does not grow with the model; the device memory grows by the model's size."""
    load(folder, "mp_rank_00_model_states.pt", "cuda")  # allocates the memory of CUDA itself
    host, device = anonymous(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load(folder, "mp_rank_00_model_states.pt", "cuda")
    nbytes = sum(p.nbytes for p in model.parameters())
    assert anonymous() - host < 0.1 * nbytes
    assert torch.cuda.max_memory_allocated() - device < 1.1 * nbytes


def test_fp8_weights_are_the_same_numbers_as_on_the_cpu(folder):
    """Stored FP8 weights take one byte each; dequantised on the GPU or the CPU, they have equal bits."""
    held, plain = load(folder, "fp8", "cuda", "storage"), load(folder, "fp8", "cuda")
    on_cpu = load(folder, "fp8", "cpu").state_dict()
    assert all(torch.equal(tensor.cpu(), on_cpu[name]) for name, tensor in plain.state_dict().items())
    saved = sum(module.weight.numel() for module in block_linears(held).values())
    assert sum(p.nbytes for p in plain.parameters()) - sum(p.nbytes for p in held.parameters()) == saved
    inputs = random_inputs(CONFIG, (2, 4, 6), [7], seed=3, padded=9)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    assert torch.equal(held(**inputs), plain(**inputs))
