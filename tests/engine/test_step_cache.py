"""The step cache: which steps it skips, on one rank and on several, and that a denoise with a cache can be resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.sampling.sampler import SamplingOptions, denoise, trajectory
from hv_batch.engine.step_cache import REFRESH, can_resume, is_fresh
from hv_batch.protocol import ParallelPlan, SamplingParams, StepState
from tests.support.dit_reference import random_dit
from tests.support.rank_processes import joined
from tests.support.trajectories import CONFIG, CPU, random_text

STEPS = 14
PARAMS = SamplingParams(
    prompt="",
    negative_prompt="",
    height=80,  # 5 x 5 x 3 tokens, which neither 2 nor 4 divides
    width=80,
    num_frames=9,
    num_inference_steps=STEPS,
    seed=3,
    guidance_scale=6.0,
    cfg_scale=3.0,
    guidance_rescale=0.0,
    flow_shift=7.0,
)
ALWAYS_FRESH = sum(is_fresh(step, STEPS) for step in range(STEPS))
SOME = 0.5  # a threshold at which some of the other steps are skipped here, and some are not
PLANS = [
    ParallelPlan(ulysses_degree=2),
    ParallelPlan(ring_degree=2),
    ParallelPlan(ulysses_degree=2, ring_degree=2),
    ParallelPlan(cfg_degree=2),
    ParallelPlan(ulysses_degree=2, cfg_degree=2),
]


class Counted:
    """A DiT that counts the forward passes of its last block."""

    def __init__(self):
        self.model = random_dit(CONFIG, seed=1)
        self.passes = 0
        self.model.single_blocks[-1].register_forward_hook(self._count)

    def _count(self, *_):
        self.passes += 1


def render(model, threshold, params=PARAMS, on_step=lambda done, latents: None, resume=None):
    options = SamplingOptions(step_cache=threshold)
    texts = (random_text(31), random_text(12) if params.uses_cfg else None)
    return denoise(
        model, params, *texts, mesh=SequenceMesh.single(), device=CPU, on_step=on_step, options=options, resume=resume
    )


@given(steps=st.integers(1, 200), done=st.integers(0, 199))
def test_a_denoise_can_be_resumed_before_complete_steps(steps, done):
    """P4: two complete steps follow a resume, which gives the duration of a step; the last step is complete as well."""
    assert is_fresh(steps - 1, steps)
    if can_resume(done):
        assert is_fresh(done, steps)
        assert is_fresh(done + 1, steps)
    assert any(can_resume(step) for step in range(done, done + REFRESH))


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_what_changes_more_is_computed(cfg_scale):
    """With a tiny threshold all blocks compute in every step, and all bits are equal."""
    params = replace(PARAMS, cfg_scale=cfg_scale)
    plain, cached = Counted(), Counted()
    assert torch.equal(render(cached.model, 1e-9, params), render(plain.model, 0.0, params))
    assert cached.passes == plain.passes == STEPS * (2 if params.uses_cfg else 1)


def test_steps_that_change_less_are_skipped():
    """With a large threshold all optional steps are skipped, for each guidance branch; with SOME, some are."""
    always = Counted()
    render(always.model, 0.999)
    assert always.passes == 2 * ALWAYS_FRESH
    some = Counted()
    near, far = render(some.model, SOME), render(Counted().model, 0.0)
    assert 2 * ALWAYS_FRESH < some.passes < 2 * STEPS
    assert 0 < (near - far).norm() < 0.1 * far.norm()


def test_videos_of_a_batch_have_separate_caches():
    """P3: the skipped steps of a video do not depend on the other videos of the batch."""
    options, mesh, seeds = SamplingOptions(step_cache=SOME), SequenceMesh.single(), (3, 4)
    batch = [replace(PARAMS, seed=seed) for seed in seeds]
    model, texts = Counted().model, ([random_text(31), random_text(7)], [random_text(12), random_text(12)])
    *_, both = trajectory(model, batch, *texts, mesh=mesh, device=CPU, options=options)
    for one, params, positive, negative in zip(both, batch, *texts, strict=True):
        alone = denoise(
            model,
            params,
            positive,
            negative,
            mesh=mesh,
            device=CPU,
            on_step=lambda done, latents: None,
            options=options,
        )
        assert torch.equal(one, alone)


def test_a_denoise_resumes_to_the_same_bits():
    """P4: a resume gives equal bits after every step that allows a checkpoint; after other steps it is refused."""
    states = {}
    whole = render(Counted().model, SOME, on_step=lambda done, latents: states.setdefault(done, latents.numpy()))
    for done, latents in states.items():
        if can_resume(done) and done < STEPS:
            assert torch.equal(render(Counted().model, SOME, resume=StepState(done, latents)), whole)
    with pytest.raises(ValueError, match="cannot resume after step 7"):
        render(Counted().model, SOME, resume=StepState(7, states[7]))


def _rank_main(rank: int, folder: Path, queues: list[mp.Queue]) -> None:
    torch.set_num_threads(1)
    for plan, queue in zip(PLANS, queues, strict=True):
        if rank >= plan.world_size:
            continue
        counted, arguments = Counted(), ([PARAMS], [random_text(31)], [random_text(12)])
        with joined(rank, plan, queue) as mesh:
            *_, final = trajectory(
                counted.model, *arguments, mesh=mesh, device=CPU, options=SamplingOptions(step_cache=SOME)
            )
        torch.save((final[0], counted.passes), folder / f"{plan}-{rank}.pt")


def test_all_ranks_skip_the_same_blocks(tmp_path):
    """All ranks make the decision of a single rank. Different decisions would deadlock the group."""
    context = mp.get_context("forkserver")  # imports torch once, not once per process
    context.set_forkserver_preload(["hv_batch.engine.sampling.sampler", "pytest"])
    mp.start_processes(_rank_main, (tmp_path, [context.Queue() for _ in PLANS]), nprocs=4, start_method="forkserver")
    alone = Counted()
    expected = render(alone.model, SOME)
    for plan in PLANS:
        results = [torch.load(tmp_path / f"{plan}-{rank}.pt", weights_only=True) for rank in range(plan.world_size)]
        assert all(torch.equal(final, results[0][0]) for final, _ in results), plan
        assert (results[0][0] - expected).abs().max() <= 1e-4, plan
        branches = [sum(passes for _, passes in results[:: plan.sequence_degree])]
        assert branches == [alone.passes], plan
