"""Offloaded weights: equal bits on one rank and in a group, from two buffers."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from hv_batch.architecture import DiTConfig
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.dit.offload import BlockStreamer, StreamedBlock, offload_blocks
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.text_encoders import TextEmbedding
from hv_batch.protocol import ParallelPlan
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from tests.support.dit_reference import ALONE, SMALL_VIDEO, keep_in_fp8, random_dit, random_inputs
from tests.support.live_bytes import LiveBytes
from tests.support.rank_processes import joined

CPU = torch.device("cpu")
PLANS = [(2, 1), (1, 2)]


def config(double: int = 2, single: int = 3) -> DiTConfig:
    return DiTConfig(
        hidden_size=96,
        heads_num=12,
        mm_double_blocks_depth=double,
        mm_single_blocks_depth=single,
        rope_dim_list=(2, 4, 2),
        text_states_dim=16,
        text_states_dim_2=8,
    )


def inputs(text_lengths=(7,)):
    return random_inputs(config(), (3, 6, 10), list(text_lengths), seed=2, padded=12)


def frozen(shape: DiTConfig, dtype: torch.dtype = torch.float32) -> HYVideoDiT:
    return random_dit(shape, seed=1).to(dtype).requires_grad_(False)


def block_bytes(model: HYVideoDiT) -> list[int]:
    return [sum(p.nbytes for p in block.parameters()) for block in (*model.double_blocks, *model.single_blocks)]


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("depth", [(2, 2), (2, 3), (1, 1), (1, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_weights_give_the_same_bits(pinned, depth, dtype):
    """P3: offloading changes no bit, with odd numbers of blocks, several steps and two branches."""
    model = frozen(config(*depth), dtype)
    expected = [model(**inputs(lengths)) for lengths in ((7,), (3, 12))]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    offload_blocks(model, CPU, pinned=pinned)
    for _ in range(3):
        assert torch.equal(model(**inputs()), expected[0])
        assert torch.equal(model(**inputs((3, 12))), expected[1])
    after = {name.replace(".block.", "."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_no_more_than_two_blocks_are_on_the_device():
    """Every weight that a block computes with is in one of two buffers of one block each."""
    model = frozen(config())
    largest = max(block_bytes(model))
    with LiveBytes() as traced:
        streamer = offload_blocks(model, CPU, pinned=False)
    assert 2 * largest <= streamer.device_bytes <= 2 * largest + 2 * 512 * 30  # each of under 30 tensors is aligned
    assert traced.peak == streamer.device_bytes

    seen = []

    def remember(block, args):
        seen.append({parameter.untyped_storage().data_ptr() for parameter in block.parameters()})

    for streamed in (*model.double_blocks, *model.single_blocks):
        assert isinstance(streamed, StreamedBlock)
        streamed.block.register_forward_pre_hook(remember)
    model(**inputs())
    assert len(seen) == 5
    assert all(len(buffers) == 1 for buffers in seen)
    assert all(before != after for before, after in itertools.pairwise(seen)), "the next block goes to the other buffer"
    assert len(set.union(*seen)) == 2


def test_streaming_allocates_nothing():
    """A forward with offloading allocates as much as one without, in every step."""
    plain, streamed = frozen(config()), frozen(config())
    offload_blocks(streamed, CPU, pinned=True)
    peaks = []
    for model in (plain, streamed, streamed):
        with LiveBytes() as traced:
            model(**inputs())
        peaks.append(traced.peak)
    assert peaks[0] == peaks[1] == peaks[2]


def test_the_next_block_is_fetched_ahead_and_once(monkeypatch):
    """Prefetch: each block is fetched once, before it is requested, also across the end of a step."""
    fetched = []
    fetch = BlockStreamer._fetch
    monkeypatch.setattr(BlockStreamer, "_fetch", lambda self, index: (fetched.append(index), fetch(self, index))[1])
    model = frozen(config(2, 3))
    streamer = offload_blocks(model, CPU, pinned=False)
    model(**inputs())
    assert fetched == [0, 1, 2, 3, 4, 0]
    with streamer.resident(0):
        assert fetched == [0, 1, 2, 3, 4, 0], "block 0 was fetched at the end of the previous step"
    assert fetched[-1] == 1


def test_fp8_weights_stream_with_their_scales():
    """FP8 with offloading: 8-bit weights and the buffers with their scales are streamed."""
    model = frozen(config(), torch.bfloat16)
    before = max(block_bytes(model))
    keep_in_fp8(model)
    expected = model(**inputs())
    streamer = offload_blocks(model.requires_grad_(False), CPU, pinned=True)
    assert torch.equal(model(**inputs()), expected)
    assert streamer.device_bytes < 2 * 0.7 * before


def test_a_failed_step_does_not_affect_the_next_one():
    """P5: an error in a block (such as out of memory) does not change the result of the next sample."""
    model = frozen(config())
    expected = model(**inputs())
    offload_blocks(model, CPU, pinned=True)
    for index in (0, 1, 3, 4):
        block = [*model.double_blocks, *model.single_blocks][index].block

        def fail(*_):
            raise MemoryError

        handle = block.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            model(**inputs())
        handle.remove()
        assert torch.equal(model(**inputs()), expected), index


def test_packing_fills_arenas_of_a_power_of_two(monkeypatch):
    """Pinned allocations are powers of two, so tensors share arenas; a tensor larger than an arena gets its own."""
    monkeypatch.setattr("hv_batch.engine.dit.offload.ARENA_BYTES", 2**17)
    model = frozen(config())
    expected = model(**inputs())
    offload_blocks(model, CPU, pinned=True)
    arenas = {}
    for block in (*model.double_blocks, *model.single_blocks):
        for parameter in block.parameters():
            arenas[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage().nbytes()
    assert sum(arenas.values()) <= 1.5 * sum(block_bytes(model))
    assert sum(size == 2**17 for size in arenas.values()) > 2
    assert max(arenas.values()) > 2**17
    assert torch.equal(model(**inputs()), expected)


def _rank_main(rank: int, folder: Path, addresses: dict[tuple[int, int], mp.Queue]) -> None:
    torch.set_num_threads(1)
    for u, r in PLANS:
        with joined(rank, ParallelPlan(ulysses_degree=u, ring_degree=r), addresses[u, r]) as mesh:
            model = frozen(config())
            outputs = [model(**inputs((7, 12)), mesh=mesh)]
            offload_blocks(model, CPU, pinned=True)
            outputs += [model(**inputs((7, 12)), mesh=mesh) for _ in range(2)]
        torch.save(outputs, folder / f"u{u}r{r}-{rank}.pt")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["hv_batch.engine.dit.offload", "pytest"])
    addresses = {plan: context.Queue() for plan in PLANS}
    mp.start_processes(_rank_main, (folder, addresses), nprocs=2, start_method="forkserver")
    return folder


@pytest.mark.parametrize(("u", "r"), PLANS)
def test_a_group_streams_too(group, u, r):
    """Offloading works with sequence parallelism, which the released code refuses; all ranks have equal bits."""
    ranks = [torch.load(group / f"u{u}r{r}-{rank}.pt") for rank in range(2)]
    outputs = list(itertools.chain.from_iterable(ranks))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    alone = frozen(config())(**inputs((7, 12)), mesh=SequenceMesh.single())
    assert (outputs[0] - alone).abs().max() < 1e-4


# ---- the engine's option


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


def _mapped_pages(path: Path) -> list[range]:
    """Return the address ranges at which this process has mapped a file."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = (line.split()[0].split("-") for line in lines)
    return [range(int(low, 16), int(high, 16)) for low, high in spans]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("offload", ["none", "blocks", "mapped"])
def test_the_option_selects_the_memory_of_the_blocks(toy, offload):
    """`mapped` streams from the pages of the checkpoint file, which the ranks of a node share; `blocks` does not."""
    engine = HunyuanVideo(model_base=toy, dit=TOY_DIT, precision="bf16", offload=offload)
    model = engine.join(ALONE)._model
    pages = _mapped_pages(toy / "hunyuan-video-t2v-720p" / "transformers" / "mp_rank_00_model_states.pt")
    inside = [
        any(parameter.data_ptr() in span for span in pages)
        for block in (*model.double_blocks, *model.single_blocks)
        for parameter in block.parameters()
    ]
    assert len(inside) > 20
    if offload == "blocks":
        assert not any(inside)
    else:
        assert all(inside)  # with "none" on a CPU, the weights are mapped as well
    streamed = [isinstance(block, StreamedBlock) for block in (*model.double_blocks, *model.single_blocks)]
    assert all(streamed) if offload != "none" else not any(streamed)


def test_the_option_changes_no_bit_and_no_identity(toy):
    """P3: a run may be resumed with offloading, for example on a smaller GPU."""
    text = TextEmbedding(
        states=torch.randn(5, TOY_DIT["text_states_dim"], generator=torch.Generator().manual_seed(0)),
        pooled=torch.randn(TOY_DIT["text_states_dim_2"], generator=torch.Generator().manual_seed(1)),
        num_tokens=4,
        tokens_lost=0,
    )
    build = partial(HunyuanVideo, model_base=toy, dit=TOY_DIT, precision="fp32")
    engines = [build(offload=offload) for offload in ("none", "blocks", "mapped")]
    latents = [
        torch.from_numpy(e.join(ALONE).denoise(SMALL_VIDEO, text, None, lambda _n, _read: None)) for e in engines
    ]
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])
    assert engines[0].identity() == engines[1].identity() == engines[2].identity()
