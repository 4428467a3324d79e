"""The sequence-parallel DiT on real process groups, against one rank.

Processes join one group after the other, run every case twice and write the results to files, which the tests read. The
sizes cover the edge cases: token counts that no degree divides, shards of padding only, ring chunks of padding only.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.architecture import DiTConfig
from hv_batch.attention_methods import SparseAttention, StepAttention
from hv_batch.engine.attention.block_selection import select_blocks
from hv_batch.engine.attention.kernels import attend_math, attend_sdpa
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.dit.offload import offload_blocks
from hv_batch.engine.parallel.process_group import host_store, join_group, leave_group
from hv_batch.engine.parallel.sequence import SequenceMesh, attend_jointly
from hv_batch.engine.self_check import check_group
from hv_batch.protocol import ParallelPlan, RankSpec, UserError
from tests.support.dit_reference import keep_in_fp8, random_dit, random_inputs
from tests.support.rank_processes import joined

CONFIG = DiTConfig(
    hidden_size=96,
    heads_num=12,  # divisible by every Ulysses degree below
    mm_double_blocks_depth=2,
    mm_single_blocks_depth=2,
    rope_dim_list=(2, 4, 2),
    text_states_dim=16,
    text_states_dim_2=8,
)
PADDED = 12
DAMAGED_LINEAR = "single_blocks.0.linear2"


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int]  # latents T, h, w
    text_lengths: tuple[int, ...]
    dtype: torch.dtype = torch.float32


CASES = [
    Case((1, 2, 2), (1,)),  # one image token: every other shard is padding
    Case((1, 2, 4), (7,)),  # two tokens: at a ring of 3 or 4, chunks of padding only
    Case((1, 2, 10), (PADDED,)),  # five tokens
    Case((3, 6, 10), (7,)),  # 45 tokens: odd, and of the degrees below only 3 divides it
    Case((2, 4, 6), (PADDED,)),
    Case((3, 6, 10), (7, PADDED)),  # classifier-free guidance: two items, two text lengths
    Case((1, 14, 2), (1, PADDED)),
    Case((3, 6, 10), (7,), torch.bfloat16),
]
SPARSE_CASE = Case((3, 10, 10), (7, PADDED))  # 75 tokens, with guidance
SPARSE = StepAttention(SparseAttention(density=0.3, brick=(2, 2, 2), neighbours="none", backend="eager"))
SPARSE_PLANS = [(2, 1), (4, 1)]
PLANS = [(2, 2)]  # (Ulysses degree, ring degree)
MORE = [  # all other plans of up to eight ranks whose Ulysses degree divides the twelve heads
    (u, r) for u in (1, 2, 3, 4, 6) for r in range(1, 9) if 1 < u * r <= 8 and (u, r) not in PLANS
]
EVERY_PLAN = [*PLANS, *(pytest.param(u, r, marks=pytest.mark.slow) for u, r in MORE)]


@cache
def _model(dtype: torch.dtype) -> HYVideoDiT:
    return random_dit(CONFIG, seed=1).to(dtype)


def _forward(case: Case, mesh: SequenceMesh) -> torch.Tensor:
    inputs = random_inputs(CONFIG, case.size, list(case.text_lengths), seed=2, padded=PADDED)
    return _model(case.dtype)(**inputs, mesh=mesh)


def _sparse_forward(mesh: SequenceMesh) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the velocity of SPARSE_CASE with sparse attention, and the chosen blocks of each call, for own heads."""
    inputs = random_inputs(CONFIG, SPARSE_CASE.size, list(SPARSE_CASE.text_lengths), seed=2, padded=PADDED)
    chosen = []

    def record(*args):
        chosen.append(select_blocks(*args))
        return chosen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hv_batch.engine.attention.block_sparse.select_blocks", record)
        return _model(SPARSE_CASE.dtype)(**inputs, mesh=mesh, attention=SPARSE), chosen


def _attend(mesh: SequenceMesh) -> torch.Tensor:
    """Return this rank's rows of the joint attention of 5 text and 9 image tokens."""
    qkv = torch.randn(5 + 9, 3, 12, 8, generator=torch.Generator().manual_seed(3))
    start, stop = mesh.span(9)
    image = torch.cat((qkv[5:], torch.full((8, 3, 12, 8), float("nan"))))[start:stop]
    return attend_jointly(torch.cat((qkv[:5], image)), 5, 9, mesh, attend_sdpa)


def _rank_main(
    rank: int, folder: Path, addresses: dict[tuple[int, int], mp.Queue], sparse: dict[tuple[int, int], mp.Queue]
) -> None:
    torch.set_num_threads(1)
    for u, r in sparse:
        if rank < u * r:
            with joined(rank, ParallelPlan(ulysses_degree=u, ring_degree=r), sparse[u, r]) as mesh:
                torch.save(_sparse_forward(mesh), folder / f"sparse-u{u}-{rank}.pt")
    for u, r in addresses:
        if rank >= u * r:
            continue
        with joined(rank, ParallelPlan(ulysses_degree=u, ring_degree=r), addresses[u, r]) as mesh:
            runs = {case: (_forward(case, mesh), _forward(case, mesh)) for case in CASES}
            torch.save((runs, _attend(mesh)), folder / f"u{u}r{r}-{rank}.pt")
            (folder / f"checks-u{u}r{r}-{rank}.json").write_text(json.dumps(_self_checks(mesh)))


def _self_checks(mesh: SequenceMesh) -> dict[str, str]:
    """Run the self-check on healthy models with weights in every form, and on models that are damaged on the last rank.

    Returns the error messages by model; a model without an error is absent.
    """
    models = {"float32": _model(torch.float32), "bfloat16": _model(torch.bfloat16)}
    models |= {"offloaded": _own_model(), "mapped": _own_model(), "FP8": _own_model(), "FP8 offloaded": _own_model()}
    models |= {"damaged": random_dit(CONFIG, seed=1), "FP8 weights": _own_model(), "FP8 scale": _own_model()}
    for name, model in models.items():
        if name.startswith("FP8"):
            keep_in_fp8(model)
    if mesh.rank == mesh.size - 1:
        next(models["damaged"].single_blocks.parameters()).data.mul_(1.05)
        held = models["FP8 weights"].get_submodule(DAMAGED_LINEAR)
        held.weight.data = held.weight.data.flip(0)
        models["FP8 scale"].get_submodule(DAMAGED_LINEAR).scale.mul_(1.5)
    for name in ("offloaded", "mapped", "FP8 offloaded"):
        offload_blocks(models[name], torch.device("cpu"), pinned=name != "mapped")
    errors = {}
    for name, model in models.items():
        try:
            check_group(model, mesh, torch.device("cpu"))
        except RuntimeError as error:
            errors[name] = str(error)
    return errors


def _own_model() -> HYVideoDiT:
    return random_dit(CONFIG, seed=1).bfloat16().requires_grad_(False)


def _rank_spec(rank: int, u: int, r: int, address: str, timeout_s: float) -> RankSpec:
    return RankSpec(
        rank=rank,
        local_rank=rank,
        plan=ParallelPlan(ulysses_degree=u, ring_degree=r),
        device="cpu",
        address=address,
        timeout_s=timeout_s,
    )


class Ranks:
    """The results of every rank of every plan, one file each. Plans of slow tests run only if they are requested."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ran: list[tuple[int, int]] = []

    def load(self, u: int, r: int):
        self._run(u, r)
        return [torch.load(self.folder / f"u{u}r{r}-{rank}.pt", weights_only=False) for rank in range(u * r)]

    def self_check_errors(self, u: int, r: int) -> list[dict[str, str]]:
        """Return the error messages of the self-check by model, for each rank."""
        self._run(u, r)
        return [json.loads((self.folder / f"checks-u{u}r{r}-{rank}.json").read_text()) for rank in range(u * r)]

    def sparse(self, u: int) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Return the results of `_sparse_forward` of each rank."""
        self._run(*PLANS[0])
        return [torch.load(self.folder / f"sparse-u{u}-{rank}.pt") for rank in range(u)]

    def _run(self, u: int, r: int) -> None:
        if (u, r) in self.ran:
            return
        plans = PLANS if (u, r) in PLANS else MORE
        context = mp.get_context("forkserver")  # imports torch once, not once per process
        context.set_forkserver_preload(["hv_batch.engine.dit.model", "hypothesis", "pytest"])
        addresses = {plan: context.Queue() for plan in plans}
        sparse = {plan: context.Queue() for plan in SPARSE_PLANS if plans is PLANS}
        processes = max(u * r for u, r in plans)
        mp.start_processes(_rank_main, (self.folder, addresses, sparse), nprocs=processes, start_method="forkserver")
        self.ran += plans


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def single() -> dict[Case, torch.Tensor]:
    return {case: _forward(case, SequenceMesh.single()) for case in CASES}


@pytest.mark.parametrize(("u", "r"), EVERY_PLAN)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_group_equals_one_rank(ranks, single, u, r, case):
    """Design section 5: every size works at every degree, exact up to float rounding (P3: measured here)."""
    runs, _ = ranks.load(u, r)[0]
    tolerance = 1e-4 if case.dtype is torch.float32 else 0.1 * single[case].abs().max().item()
    assert single[case].std() > 0.1
    assert (runs[case][0] - single[case]).abs().max().item() <= tolerance


@pytest.mark.parametrize(("u", "r"), EVERY_PLAN)
def test_every_rank_returns_the_same_bits_every_time(ranks, u, r):
    """P3: same plan, same bytes. The sampler can run replicated, because the velocity is equal on all ranks."""
    loaded = [runs for runs, _ in ranks.load(u, r)]
    for case in CASES:
        outputs = list(itertools.chain.from_iterable(runs[case] for runs in loaded))
        assert all(torch.equal(outputs[0], other) for other in outputs[1:]), case


@pytest.mark.parametrize("u", [u for u, _ in SPARSE_PLANS])
def test_ranks_select_the_blocks_of_one_rank(ranks, u):
    """Sparse attention under Ulysses: each rank selects for its heads what one rank selects, and the results agree."""
    alone, chosen = _sparse_forward(SequenceMesh.single())
    assert torch.stack(chosen).float().mean() < 0.6
    results = ranks.sparse(u)
    for number, blocks in enumerate(chosen):
        assert torch.equal(torch.cat([own[number] for _, own in results]), blocks)
    assert all(torch.equal(velocity, results[0][0]) for velocity, _ in results)
    assert torch.allclose(results[0][0], alone, atol=1e-4)


@pytest.mark.parametrize(("u", "r"), EVERY_PLAN)
def test_attention_rows(ranks, u, r):
    """The text rows have equal bits on all ranks, and NaN in the padding affects no valid row."""
    qkv = torch.randn(5 + 9, 3, 12, 8, generator=torch.Generator().manual_seed(3))
    expected, _ = attend_math(*qkv.unbind(1))
    outputs = [attended for _, attended in ranks.load(u, r)]
    assert all(torch.equal(outputs[0][:5], attended[:5]) for attended in outputs[1:])
    assembled = torch.cat([outputs[0][:5], *(attended[5:] for attended in outputs)])[:14]
    assert (assembled - expected.flatten(1)).abs().max().item() <= 1e-5


@pytest.mark.parametrize(("u", "r"), EVERY_PLAN)
def test_the_self_check_detects_damaged_weights_only(ranks, u, r):
    """Design section 5: the self-check passes on healthy ranks in every precision, with weights on the device or
    streamed, in 16 bits or 8. At least one rank detects a damaged copy of the weights.
    """
    errors = ranks.self_check_errors(u, r)
    assert {name for by_model in errors for name in by_model} == {"damaged", "FP8 weights", "FP8 scale"}
    for damage in ("damaged", "FP8 weights", "FP8 scale"):
        message = next(by_model[damage] for by_model in errors if damage in by_model)
        assert "deviates from what rank" in message
        assert f"Ulysses {u} x ring {r}" in message


def test_weights_that_give_nan_are_refused():
    """Design section 5: the self-check of a single rank has no peer to compare with, but refuses NaN."""
    model = random_dit(CONFIG, seed=1)
    check_group(model, SequenceMesh.single(), torch.device("cpu"))
    next(model.single_blocks.parameters()).data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        check_group(model, SequenceMesh.single(), torch.device("cpu"))


@given(st.integers(1, 4000), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_shards_partition_the_tokens(length, u, r):
    """Equal shards in rank order cover the tokens; padding (fewer rows than ranks) is at the end."""
    meshes = [SequenceMesh(rank=rank, ulysses_degree=u, ring_degree=r) for rank in range(u * r)]
    spans = [mesh.span(length) for mesh in meshes]
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert 0 <= spans[-1][1] - length < u * r
    tokens = torch.arange(length).unsqueeze(1)
    assert torch.equal(torch.cat([mesh.shard(tokens) for mesh in meshes])[:length], tokens)
    chunks = meshes[0].chunk_lengths(length)
    assert sum(chunks) == length
    for mesh in meshes:
        valid_rows = sum(
            max(0, min(stop, length) - start)
            for (start, stop), other in zip(spans, meshes, strict=True)
            if other.ring_index == mesh.ring_index
        )
        assert chunks[mesh.ring_index] == valid_rows


def test_one_rank_needs_no_group():
    """A group of one rank joins without a process group."""
    assert join_group(_rank_spec(0, 1, 1, "nowhere:1", 1.0)) == SequenceMesh.single()
    assert not torch.distributed.is_initialized()
    leave_group()


def test_a_missing_rank_is_an_error_not_a_hang():
    """P5: if a rank never joins, the others fail at their timeout, so that the group can be rebuilt."""
    address = host_store("127.0.0.1", 2)
    with pytest.raises(RuntimeError):
        join_group(_rank_spec(0, 2, 1, address, 1.0))
    leave_group()
    assert not torch.distributed.is_initialized()


def test_two_groups_on_one_host_have_separate_addresses():
    """Two groups of one node get two addresses, each with a port that the system chose, without a race for ports."""
    addresses = {host_store("127.0.0.1", 2), host_store("127.0.0.1", 2)}
    assert len(addresses) == 2
    leave_group()


def test_heads_that_do_not_split_are_refused():
    """P6: a Ulysses degree that does not divide the heads is refused before any collective; the error names the key."""
    inputs = random_inputs(CONFIG, (1, 2, 2), [1], seed=0, padded=1)
    mesh = SequenceMesh(rank=0, ulysses_degree=5, ring_degree=1)
    with pytest.raises(UserError, match="ulysses_degree"):
        random_dit(CONFIG, seed=0)(**inputs, mesh=mesh)
