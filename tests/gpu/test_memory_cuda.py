"""On a CUDA device: offloading gives equal bits from two buffers, and the memory model matches the allocator."""

from __future__ import annotations

import pytest
import torch

from hv_batch.architecture import DiTConfig, TileGeometry, VAEConfig
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.dit.offload import offload_blocks
from hv_batch.engine.vae.model import CausalVAE
from hv_batch.engine.vae.tiling import decode_streaming
from hv_batch.job.cost_model.memory import decode_activations, dit_activations
from hv_batch.job.cost_model.model import ModelShape
from tests.support.dit_reference import random_dit, random_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEPTH = {"mm_double_blocks_depth": 3, "mm_single_blocks_depth": 4}
# The caching allocator rounds and splits, and kernels allocate workspaces. The cost model's reserve covers this.
TOLERANCE = 0.10


def inputs(config: DiTConfig, size: tuple[int, int, int]) -> dict:
    given = random_inputs(config, size, [40], seed=2, padded=40)
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def mid_config() -> DiTConfig:
    return DiTConfig(hidden_size=1024, heads_num=8, text_states_dim=64, text_states_dim_2=32, **DEPTH)


@pytest.mark.parametrize("pinned", [True, False])
def test_streamed_weights_give_the_same_bits(pinned):
    """P3: offloading with streams and events changes no bit. Many steps in a row would reveal a mistimed copy."""
    config = mid_config()
    host = random_dit(config, seed=1).bfloat16().requires_grad_(False)
    given = inputs(config, (5, 32, 32))
    resident = HYVideoDiT(config).cuda().bfloat16().requires_grad_(False)
    resident.load_state_dict(host.state_dict())
    expected = resident(**given)
    streamer = offload_blocks(host, torch.device("cuda", 0), pinned=pinned)
    if pinned:
        assert all(p.is_pinned() for block in host.double_blocks for p in block.parameters())
    for _ in range(20):
        assert torch.equal(host(**given), expected)
    largest = max(sum(p.nbytes for p in block.parameters()) for block in (*host.double_blocks, *host.single_blocks))
    assert streamer.device_bytes < 2.01 * largest


def test_offloading_keeps_two_blocks_on_the_device():
    """The device memory before a forward is that of the weights outside the blocks and of two buffers."""
    config = mid_config()
    host = random_dit(config, seed=1).bfloat16().requires_grad_(False)
    rest = sum(p.nbytes for name, p in host.named_parameters() if "_blocks" not in name)
    before = torch.cuda.memory_allocated()
    streamer = offload_blocks(host, torch.device("cuda", 0), pinned=True)
    assert torch.cuda.memory_allocated() - before <= 1.05 * (rest + streamer.device_bytes)


@pytest.mark.parametrize("attention", ["sdpa", "cudnn"])
@pytest.mark.parametrize("size", [(9, 68, 120), (33, 90, 160)], ids=str)
def test_the_memory_of_a_forward(size, attention):
    """`dit_activations` equals the allocator's peak at the released width, within 10 %."""
    options = {"mm_double_blocks_depth": 1, "mm_single_blocks_depth": 1}
    with torch.device("cuda"):
        model = HYVideoDiT(DiTConfig(**options), attention).bfloat16().requires_grad_(False)
    given = inputs(model.config, size)
    model(**given)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(**given)
    peak = torch.cuda.max_memory_allocated() - before
    shape = ModelShape(dit=DiTConfig(**options))
    assert dit_activations(shape, size[0] * size[1] * size[2] // 4, 1, 1, text=40) == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize("latents", [(17, 40, 40), (33, 68, 120), (9, 48, 72)], ids=str)
def test_the_memory_of_a_decode(latents):
    """`decode_activations` equals the allocator's peak, within 3 %."""
    frames, height, width = latents
    with torch.device("cuda"):
        vae = CausalVAE(VAEConfig()).half().requires_grad_(False).eval()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _chunk in decode_streaming(vae, torch.randn(1, 16, *latents), TileGeometry()):
        pass
    peak = torch.cuda.max_memory_allocated() - before
    shape = (8 * height, 8 * width, 4 * (frames - 1) + 1)
    assert decode_activations(ModelShape(), shape) == pytest.approx(peak, rel=0.03)
