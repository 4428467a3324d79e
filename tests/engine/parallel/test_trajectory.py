"""Whole trajectories on parallel plans of up to eight ranks, against one rank.

Eight processes join one group after the other. Each renders every case of a plan and writes the results to files, which
the tests read. The sizes are those of the release, scaled down: grids of the same proportions whose number of tokens
has the same remainder modulo 8, so that every degree needs the same padding as at the released size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.sampling.sampler import trajectory
from hv_batch.protocol import ParallelPlan
from hv_batch.sampling_params import SamplingParams
from tests.support.dit_reference import random_dit
from tests.support.rank_processes import joined
from tests.support.trajectories import CONFIG, CPU, random_text

STEPS = 4
FRAMES = 33  # 9 latent frames: one more than a multiple of 8, as the 33 of the release
TOLERANCE = 1e-4  # largest allowed difference from one rank, anywhere in the final latents

GRIDS = {  # released height x width -> token rows x columns of the toy
    (544, 960): (8, 14),
    (960, 544): (14, 8),
    (624, 832): (3, 4),
    (832, 624): (4, 3),
    (720, 720): (5, 5),
    (720, 1280): (9, 16),
    (1280, 720): (16, 9),
    (1104, 832): (12, 9),
    (832, 1104): (9, 12),
    (960, 960): (4, 4),
}


def _plan(u: int, r: int, cfg: int = 1) -> ParallelPlan:
    return ParallelPlan(ulysses_degree=u, ring_degree=r, cfg_degree=cfg)


PLANS = [_plan(*ur) for ur in [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4), (8, 1)]]
HALVED = [_plan(*ur, 2) for ur in [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]]


@dataclass(frozen=True)
class Case:
    """The videos of one batch."""

    grid: tuple[int, int]
    texts: tuple[int, ...]  # valid tokens of each video's prompt
    negatives: tuple[int, ...] = ()  # and of its negative prompt, if guidance is used


# The shortest and the longest prompt, and odd lengths in between.
LENGTHS = (1, 256, 7, 77, 255, 2, 128, 31, 190, 13)
RELEASED = [Case(grid, (length,)) for grid, length in zip(GRIDS.values(), LENGTHS, strict=True)]
GUIDED_BATCH = Case((5, 5), (31, 1), (12, 256))
GUIDED_ALONE = [Case((5, 5), (31,), (12,)), Case((5, 5), (1,), (256,))]
# Cases of the exhaustive run only.
GUIDED = [Case((9, 16), (256,), (1,)), Case((14, 8), (1,), (256,))]
BATCH = Case((3, 4), (7, 256, 1))
ALONE = [Case(BATCH.grid, (length,)) for length in BATCH.texts]
EVERY_LENGTH = [Case((3, 4), (length,)) for length in range(1, 257)]


def _cases(plan: ParallelPlan, exhaustive: bool) -> list[Case]:
    """Return the cases of a plan.

    The exhaustive run covers all sizes, and divides all text lengths over the plans. Otherwise each plan gets some of
    the sizes, such that each size runs on several plans.
    """
    guided, first = [GUIDED_BATCH, *GUIDED_ALONE], PLANS.index(plan) if plan in PLANS else 0
    if exhaustive:
        plain = [*RELEASED, BATCH, *ALONE, *EVERY_LENGTH[first :: len(PLANS)]]
        return guided + GUIDED + (plain if plan.cfg_degree == 1 else [])
    return guided + [RELEASED[(3 * first + i) % len(RELEASED)] for i in range(3 if plan.cfg_degree == 1 else 0)]


def _render(model: HYVideoDiT, case: Case, mesh: SequenceMesh) -> Tensor:
    """Return the final latents. The seed of a video is the length of its text."""
    params = SamplingParams(
        prompt="",
        negative_prompt="",
        height=16 * case.grid[0],
        width=16 * case.grid[1],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        seed=0,
        guidance_scale=6.0,
        cfg_scale=3.0 if case.negatives else 1.0,
        guidance_rescale=0.5 if case.negatives else 0.0,
        flow_shift=7.0,
    )
    batch = [replace(params, seed=length) for length in case.texts]
    negatives = [random_text(length) for length in case.negatives] or None
    *_, final = trajectory(model, batch, [random_text(n) for n in case.texts], negatives, mesh=mesh, device=CPU)
    return final


def _model() -> HYVideoDiT:
    return random_dit(CONFIG, seed=1)


def _rank_main(rank: int, folder: Path, exhaustive: bool, addresses: dict[ParallelPlan, mp.Queue]) -> None:
    torch.set_num_threads(1)
    model = _model()
    for plan, queue in addresses.items():
        if rank >= plan.world_size:
            continue
        repeats, cases = 2 if exhaustive else 1, _cases(plan, exhaustive)
        with joined(rank, plan, queue) as mesh:
            finals = {case: [_render(model, case, mesh) for _ in range(repeats)] for case in cases}
        torch.save(finals, folder / f"{plan}-{rank}.pt")


@dataclass(frozen=True)
class Rendered:
    """The results of every rank of every plan, and of one rank alone."""

    folder: Path
    alone: dict[Case, Tensor]

    def ranks(self, plan: ParallelPlan) -> list[dict[Case, list[Tensor]]]:
        return [torch.load(self.folder / f"{plan}-{rank}.pt", weights_only=False) for rank in range(plan.world_size)]


EXHAUSTIVE = pytest.param(True, id="exhaustive", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.fixture(scope="module", params=[pytest.param(False, id="few", marks=pytest.mark.slow), EXHAUSTIVE])
def rendered(request, tmp_path_factory) -> Rendered:
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.get_context("forkserver")  # imports torch once, not once per process
    context.set_forkserver_preload(
        ["hv_batch.engine.sampling.sampler", "hv_batch.engine.text_encoders", "hypothesis", "pytest"]
    )
    addresses = {plan: context.Queue() for plan in (*PLANS, *HALVED)}
    mp.start_processes(_rank_main, (folder, request.param, addresses), nprocs=8, start_method="forkserver")
    model, cases = _model(), {case for plan in PLANS for case in _cases(plan, request.param)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like the ranks, because the bits of a sum depend on the number of threads
    alone = {case: _render(model, case, SequenceMesh.single()) for case in cases}
    torch.set_num_threads(threads)
    return Rendered(folder, alone)


@pytest.mark.parametrize("plan", [*PLANS, *HALVED], ids=str)
def test_a_group_renders_what_one_rank_renders(rendered, plan):
    """Design section 5, P3: for every released proportion at every degree, with texts of 1 to 256 tokens, with guidance
    and in batches, the difference after all steps is rounding only."""
    errors = {}
    for case, finals in rendered.ranks(plan)[0].items():
        assert rendered.alone[case].std() > 0.5
        errors[case] = (finals[0] - rendered.alone[case]).abs().max().item()
    print(f"{plan}: largest error {max(errors.values()):.1e}")  # shown with -rP
    assert {case: error for case, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("plan", [*PLANS, *HALVED], ids=str)
def test_the_bits_are_those_of_every_rank_every_run_and_every_batch(rendered, plan):
    """P3: same plan, same bytes, on each rank and in each run; a video does not depend on its batch."""
    ranks = rendered.ranks(plan)
    for case, (first, *others) in ranks[0].items():
        again = [*others, *(final for rank in ranks[1:] for final in rank[case])]
        assert all(torch.equal(first, other) for other in again), case
    for batch, alone in ((GUIDED_BATCH, GUIDED_ALONE), (BATCH, ALONE)):
        for index, video in enumerate(alone if batch in ranks[0] else []):
            assert torch.equal(ranks[0][batch][0][index], ranks[0][video][0][0]), video


@pytest.mark.parametrize("plan", HALVED, ids=str)
def test_cfg_degree_2_changes_no_bit(rendered, plan):
    """With cfg_degree 2, the group renders the bits of a group of half the ranks."""
    half = replace(plan, cfg_degree=1)
    expected = {case: [final] for case, final in rendered.alone.items()}
    if half.world_size > 1:
        expected = rendered.ranks(half)[0]
    for case, finals in rendered.ranks(plan)[0].items():
        assert torch.equal(finals[0], expected[case][0]), case
