"""Block-sparse attention: token order, block selection, the reference, the compiled kernel, and the DiT."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hv_batch.attention_methods import AttentionMethods, SparseAttention, StepAttention
from hv_batch.engine.attention.block_selection import estimate_probabilities, select_blocks
from hv_batch.engine.attention.block_sparse import SparseKernel
from hv_batch.engine.attention.kernels import attend_math, attend_sdpa
from hv_batch.engine.attention.token_order import block_layout, token_order
from hv_batch.engine.dit.embeddings import rope_table
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.sampling.sampler import SamplingOptions, trajectory
from tests.support.dit_reference import SMALL_VIDEO, random_dit, random_inputs
from tests.support.trajectories import CONFIG, CPU, random_text

SPARSE = SparseAttention(density=0.3, brick=(2, 2, 2), neighbours="faces", backend="eager", dense_until=0.0)
TEXT = 7
sides = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9))
bricks = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The threads of several test processes slow each other down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_qkv(image: int, heads: int = 3, text: int = TEXT, seed: int = 0):
    """q, k, v [S + N, H, 8], with scores that differ enough for a clear choice."""
    return torch.randn(3, text + image, heads, 8, generator=torch.Generator().manual_seed(seed)) * 2.0


def kernel(grid, options, text=TEXT):
    return SparseKernel(options, block_layout(grid, options.brick, options.neighbours, CPU), text, attend_sdpa)


@given(sides, bricks)
@settings(max_examples=60, deadline=None)
def test_the_order_is_a_permutation_with_an_exact_inverse(grid, brick):
    """Unpermuting restores every token; complete bricks are exactly one block and come first."""
    layout = block_layout(grid, brick, "all", CPU)
    tokens = torch.arange(math.prod(grid))
    assert torch.equal(layout.order.sort().values, tokens)
    assert torch.equal(tokens[layout.order][layout.inverse], tokens)
    complete = math.prod(size // side for size, side in zip(grid, brick, strict=True))
    positions = torch.stack(torch.unravel_index(layout.order[: complete * layout.block], grid), dim=1)
    places = (positions // torch.tensor(brick)).reshape(complete, layout.block, 3)
    assert (places == places[:, :1]).all()
    assert len(places[:, 0].unique(dim=0)) == complete


@given(sides, bricks, st.sampled_from(["all", "faces", "none"]))
@settings(max_examples=40, deadline=None)
def test_neighbours_are_the_blocks_that_touch(grid, brick, neighbours):
    """The blocks that are always kept are those whose tokens touch, by the definition of each choice."""
    layout = block_layout(grid, brick, neighbours, CPU)
    positions = torch.stack(torch.unravel_index(layout.order, grid), dim=1)
    distance = (positions[:, None] - positions[None]).abs()
    near = {"all": distance.amax(-1) <= 1, "faces": distance.sum(-1) <= 1, "none": distance.sum(-1) == 0}[neighbours]
    expected = torch.zeros(layout.blocks, layout.blocks, dtype=torch.bool)
    for one, other in near.nonzero().tolist():
        expected[one // layout.block, other // layout.block] = True
    if layout.tokens % layout.block:
        expected[:, -1] = True
    assert torch.equal(layout.always, expected)


@given(sides, bricks, st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.sampled_from([None, 0.3, 0.7]))
@settings(max_examples=60, deadline=None)
def test_a_larger_density_keeps_more(grid, brick, low, high, top_p):
    """The floor, the block itself, and its neighbours are always kept. A larger density keeps a superset, so the kept
    probability is monotone. top_p keeps at least this estimated probability.
    """
    assume(low <= high)
    options = SparseAttention(density=low, top_p=top_p, brick=brick)
    layout = block_layout(grid, brick, "all", CPU)
    q, k, _ = random_qkv(layout.tokens, text=0, seed=layout.tokens)
    kept, more = (select_blocks(q, k, layout, replace(options, density=density)) for density in (low, high))
    assert kept.shape == (3, layout.blocks, layout.blocks)
    assert (kept | ~layout.always).all()
    assert (kept.sum(-1) >= min(layout.blocks, math.ceil(low * layout.blocks))).all()
    assert (more | ~kept).all()
    probability = estimate_probabilities(q, k, layout)
    assert torch.allclose(probability.sum(-1), torch.ones(3, layout.blocks), atol=1e-5)
    if top_p:
        assert ((probability * kept).sum(-1) >= top_p - 1e-5).all()
    elif low < 1:
        budget = math.ceil(low * layout.blocks)
        assert (kept.sum(-1) <= torch.maximum(layout.always.sum(-1), torch.tensor(budget))).all()


def test_the_most_probable_blocks_are_kept():
    """A key block that matches the queries of one head is kept for that head, however far away it is."""
    options = replace(SPARSE, density=0.1, neighbours="none")
    layout = block_layout((2, 8, 20), options.brick, "none", CPU)
    q, k, _ = random_qkv(layout.tokens, heads=2, text=0) * 0.1
    q[:8, 1], k[-8:, 1] = 3.0, 3.0  # the first and the last block, in head 1
    kept = select_blocks(q, k, layout, options)
    assert kept[1, 0, -1]
    assert kept.sum(-1).eq(math.ceil(0.1 * layout.blocks)).all()


@pytest.mark.parametrize("grid", [(4, 4, 6), (3, 5, 7)], ids=str)
def test_density_1_equals_dense(grid):
    """All blocks kept: attention and log-sum-exp equal those of the dense kernel to rounding."""
    q, k, v = random_qkv(math.prod(grid))
    out, lse = kernel(grid, replace(SPARSE, density=1.0))(q, k, v)
    dense, dense_lse = attend_math(q, k, v)
    assert torch.allclose(out, dense, atol=1e-5)
    assert torch.allclose(lse, dense_lse, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4, 6), (3, 5, 7)], ids=str)
def test_the_reference_equals_masked_attention(grid):
    """The image attends to all text and to the chosen blocks; the text attends to everything."""
    q, k, v = random_qkv(math.prod(grid))
    attend = kernel(grid, replace(SPARSE, top_p=0.5))
    out, lse = attend(q, k, v)
    kept = select_blocks(q[TEXT:], k[TEXT:], attend.layout, attend.options)
    assert kept.float().mean() < 0.8
    expected, expected_lse = masked_attention(q, k, v, kept, attend.layout.block)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


def masked_attention(q, k, v, kept, block):
    image = len(q) - TEXT
    mask = torch.ones(q.shape[1], len(q), len(q), dtype=torch.bool)
    mask[:, TEXT:, TEXT:] = kept.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :image, :image]
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


@pytest.mark.slow  # the first compilation takes half a minute or more
def test_compiled_attention_equals_the_reference_and_compiles_once():
    """flex_attention gives the reference to rounding. Other text lengths and sizes compile nothing."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    options = SparseAttention(density=0.3, backend="flex")
    for grid, text in itertools.product([(5, 9, 20), (4, 16, 16)], (1, 30, 256)):
        q, k, v = random_qkv(math.prod(grid), text=text)
        out, lse = kernel(grid, options, text)(q, k, v)
        expected, _ = kernel(grid, replace(options, backend="eager"), text)(q, k, v)
        assert torch.allclose(out, expected, atol=1e-5)
        assert lse[text:].isnan().all()
        assert not out.isnan().any()
    assert counters["stats"]["unique_graphs"] == 1


def test_the_permutation_alone_is_exact():
    """The DiT with permuted tokens and all blocks kept gives the velocity of the dense DiT to rounding."""
    model, inputs = random_dit(CONFIG, seed=1), random_inputs(CONFIG, (3, 10, 14), [TEXT, 2], seed=2, padded=9)
    dense = model(**inputs)
    permuted = model(**inputs, attention=StepAttention(replace(SPARSE, density=1.0)))
    assert torch.allclose(permuted, dense, atol=1e-5 * dense.abs().max().item())
    sparse = model(**inputs, attention=StepAttention(replace(SPARSE, neighbours="none")))
    assert not torch.allclose(sparse, dense, atol=1e-3)


def test_positions_are_permuted_like_tokens():
    """The rotary angles of a shard are those of its tokens in the order of the bricks; later rows are padding."""
    grid, dims = (3, 5, 7), (2, 2, 4)
    natural = rope_table(grid, (0, 105), dims, CPU)
    permuted = rope_table(grid, (40, 110), dims, CPU, (2, 2, 2))
    order = token_order(grid, (2, 2, 2))
    assert all(torch.equal(new[:65], old[order[40:]]) for new, old in zip(permuted, natural, strict=True))
    assert all(new.shape == (70, 4) for new in permuted)


def test_the_first_steps_are_dense_and_a_batch_changes_no_bit():
    """Dense steps have the bits of a run without the method, with guidance and in a batch (P3)."""
    params = replace(SMALL_VIDEO, height=64, width=96, num_inference_steps=3, cfg_scale=3.0)
    options = SamplingOptions(attention=AttentionMethods(replace(SPARSE, neighbours="none", dense_until=0.3)))
    model = random_dit(CONFIG, seed=1)

    def latents(batch, options):
        texts = [random_text(one.seed) for one in batch]
        negatives = [random_text(4)] * len(batch)
        mesh = SequenceMesh.single()
        return list(trajectory(model, batch, texts, negatives, mesh=mesh, device=CPU, options=options))

    batch = [replace(params, seed=seed) for seed in (5, 9)]
    dense, sparse = latents(batch, SamplingOptions()), latents(batch, options)
    assert [torch.equal(one, other) for one, other in zip(dense, sparse, strict=True)] == [True, False, False]
    assert torch.equal(latents(batch[1:], options)[-1][0], sparse[-1][1])


def test_a_part_of_the_tokens_is_refused():
    """The choice needs all tokens, so a kernel call with a ring chunk is an error and not another picture."""
    q, k, v = random_qkv(96)
    with pytest.raises(ValueError, match="of 103 tokens"):
        kernel((4, 4, 6), SPARSE)(q[:50], k, v)
