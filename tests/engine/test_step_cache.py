"""The step cache: what it may leave out and when, on one rank and on many, and that a denoise with it resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.sampler import SamplingOptions, denoise, trajectory
from hv_batch.engine.step_cache import REFRESH, can_resume, is_fresh
from hv_batch.protocol import ParallelPlan, SamplingParams, StepState
from tests.support.dit_reference import random_dit
from tests.support.rank_processes import joined
from tests.support.trajectories import CONFIG, CPU, _text

STEPS = 14
PARAMS = SamplingParams(
    prompt="",
    negative_prompt="",
    height=80,  # 5 x 5 x 3 tokens, which neither two nor four ranks can share evenly
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
SOME = 0.5  # a threshold that some of the other steps keep to here, and some do not
PLANS = [
    ParallelPlan(ulysses_degree=2),
    ParallelPlan(ring_degree=2),
    ParallelPlan(ulysses_degree=2, ring_degree=2),
    ParallelPlan(cfg_degree=2),
    ParallelPlan(ulysses_degree=2, cfg_degree=2),
]


class Counted:
    """The DiT, and how often its last block has computed."""

    def __init__(self):
        self.model = random_dit(CONFIG, seed=1)
        self.passes = 0
        self.model.single_blocks[-1].register_forward_hook(self._count)

    def _count(self, *_):
        self.passes += 1


def render(model, threshold, params=PARAMS, on_step=lambda done, latents: None, resume=None):
    options = SamplingOptions(step_cache=threshold)
    texts = (_text(31), _text(12) if params.uses_cfg else None)
    return denoise(
        model, params, *texts, mesh=SequenceMesh.single(), device=CPU, on_step=on_step, options=options, resume=resume
    )


@given(steps=st.integers(1, 200), done=st.integers(0, 199))
def test_a_denoise_can_be_resumed_where_all_is_computed_next(steps, done):
    """P4: two whole steps follow, by which a rank's pace is known, and the last step is one, too."""
    assert is_fresh(steps - 1, steps)
    if can_resume(done):
        assert is_fresh(done, steps)
        assert is_fresh(done + 1, steps)
    assert any(can_resume(step) for step in range(done, done + REFRESH))


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_what_changes_more_is_computed(cfg_scale):
    """Nothing is near enough for the least threshold: all blocks compute in every step, and not a bit changes."""
    params = replace(PARAMS, cfg_scale=cfg_scale)
    plain, cached = Counted(), Counted()
    assert torch.equal(render(cached.model, 1e-9, params), render(plain.model, 0.0, params))
    assert cached.passes == plain.passes == STEPS * (2 if params.uses_cfg else 1)


def test_what_changes_less_is_left_out():
    """All but the steps that must are left out where everything is near enough, for each branch of the guidance."""
    always = Counted()
    render(always.model, 0.999)
    assert always.passes == 2 * ALWAYS_FRESH
    some = Counted()
    near, far = render(some.model, SOME), render(Counted().model, 0.0)
    assert 2 * ALWAYS_FRESH < some.passes < 2 * STEPS
    assert 0 < (near - far).norm() < 0.1 * far.norm()


def test_videos_side_by_side_keep_to_themselves():
    """P3: what one video takes over does not depend on the other beside it."""
    options, mesh, seeds = SamplingOptions(step_cache=SOME), SequenceMesh.single(), (3, 4)
    batch = [replace(PARAMS, seed=seed) for seed in seeds]
    model, texts = Counted().model, ([_text(31), _text(7)], [_text(12), _text(12)])
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
    """P4: from every step that a checkpoint may be written after; from another one not at all."""
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
        counted, arguments = Counted(), ([PARAMS], [_text(31)], [_text(12)])
        with joined(rank, plan, queue) as mesh:
            *_, final = trajectory(
                counted.model, *arguments, mesh=mesh, device=CPU, options=SamplingOptions(step_cache=SOME)
            )
        torch.save((final[0], counted.passes), folder / f"{plan}-{rank}.pt")


def test_ranks_leave_out_the_same_blocks(tmp_path):
    """Ranks that decided by their own tokens would wait for each other for ever. All decide alike, as one rank does."""
    context = mp.get_context("spawn")
    mp.start_processes(_rank_main, (tmp_path, [context.Queue() for _ in PLANS]), nprocs=4, start_method="spawn")
    alone = Counted()
    expected = render(alone.model, SOME)
    for plan in PLANS:
        found = [torch.load(tmp_path / f"{plan}-{rank}.pt", weights_only=True) for rank in range(plan.world_size)]
        assert all(torch.equal(final, found[0][0]) for final, _ in found), plan
        assert (found[0][0] - expected).abs().max() <= 1e-4, plan
        branches = [sum(passes for _, passes in found[:: plan.sequence_degree])]
        assert branches == [alone.passes], plan
