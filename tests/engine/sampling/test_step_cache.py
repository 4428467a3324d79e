"""The step cache and CFG gating in whole denoises: which steps run the model, batches, and resumes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.engine.denoiser import HunyuanDenoiser
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.sampling import sampler
from hv_batch.engine.sampling.sampler import SamplingOptions
from hv_batch.engine.sampling.step_cache import StepCache
from hv_batch.protocol import StepState
from hv_batch.step_schedule import StepSchedule
from tests.support.dit_reference import SMALL_VIDEO, random_dit
from tests.support.trajectories import CONFIG, CPU, random_text

PARAMS = replace(SMALL_VIDEO, num_inference_steps=9, seed=3, cfg_scale=3.0)
FIVE = StepSchedule(computed=5, of=9, taper=0.0)  # 0 2 4 6 8
OPTIONS = {
    "cache": SamplingOptions(step_cache=FIVE),
    "order 2": SamplingOptions(step_cache=replace(FIVE, order=2)),
    "reuse": SamplingOptions(step_cache=replace(FIVE, order=0, correct=False)),
    "list": SamplingOptions(step_cache=StepSchedule(computed=(0, 1, 2, 5, 8), of=9, order=1)),
    "gate": SamplingOptions(cfg_until=0.5),
    "both": SamplingOptions(step_cache=FIVE, cfg_until=0.5),
}
LENGTHS = (31, 12)  # tokens of the prompt and of the negative prompt


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the engine computes on a CPU: more threads wait for each other in models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Counted:
    """A DiT that counts the items of each forward."""

    def __init__(self):
        self.model, self.items = random_dit(CONFIG, seed=1), []

    def denoiser(self, options):
        def count(_module, arguments):
            self.items.append(len(arguments[0]))

        self.model.register_forward_pre_hook(count)
        return HunyuanDenoiser(self.model, SequenceMesh.single(), CPU, options)


def render(options, params=PARAMS, resume=None, denoiser=None):
    """Return the final latents, the state after each step, and the number of computed steps reported with it."""
    states, counts = {}, []

    def on_step(done, read, computed=None):
        states[done] = read()
        counts.append(computed)

    positive, negative = map(random_text, LENGTHS)
    denoiser = denoiser or Counted().denoiser(options)
    final = denoiser.denoise(params, positive, negative if params.uses_cfg else None, on_step, resume)
    return final, states, counts


@cache
def whole(name):
    return render(OPTIONS[name])


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_with_every_step_computed_nothing_changes(cfg_scale):
    """P3: a schedule of all steps gives the bits of a denoise without a cache; cfg_until has no effect without CFG."""
    params = replace(PARAMS, cfg_scale=cfg_scale)
    plain = render(SamplingOptions(), params)[0]
    all_steps = SamplingOptions(step_cache=StepSchedule(computed=9, of=9), cfg_until=None if cfg_scale > 1 else 0.5)
    assert np.array_equal(render(all_steps, params)[0], plain)


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("cache", [2, 2, 2, 2, 2]),
        ("list", [2, 2, 2, 2, 2]),
        ("gate", [2, 2, 2, 2, 2, 1, 1, 1, 1]),
        ("both", [2, 2, 2, 1, 1]),
    ],
)
def test_the_model_runs_in_computed_steps_only(name, items):
    """Five of nine steps; the negative branch in the first half. Each changes the result."""
    counted = Counted()
    final, _, counts = render(OPTIONS[name], denoiser=counted.denoiser(OPTIONS[name]))
    assert counted.items == items
    assert counts[-1] == (None if name == "gate" else 5)
    plain = render(SamplingOptions())[0]
    assert 0 < np.linalg.norm(final - plain) < 0.5 * np.linalg.norm(plain)  # of a random model, which is not smooth


@pytest.mark.parametrize("name", OPTIONS)
def test_a_denoise_resumes_after_every_step_to_the_same_bits(name):
    """P4: the state holds whatever later steps need, and is complete after computed and predicted steps alike."""
    final, states, counts = whole(name)
    for done in range(1, 9):
        again, _, later = render(OPTIONS[name], resume=states[done])
        assert np.array_equal(again, final), done
        assert later == counts[done:], "the count includes the steps before the resume"


@pytest.mark.parametrize("name", ["cache", "gate"])
def test_a_state_that_lacks_an_array_is_not_resumed_from(name):
    """P4: a checkpoint of a version without history, or one that was changed, is recognised before it is used."""
    state, denoiser = whole(name)[1][4], Counted().denoiser(OPTIONS[name])
    assert denoiser.can_resume(PARAMS, state)
    first, *_ = state.history
    lacking = {key: array for key, array in state.history.items() if key != first}
    flat = {**state.history, first: state.history[first][:, :1]}
    for history in ({}, lacking, {**state.history, "more": state.latents}, flat):
        changed = StepState(4, state.latents, history)
        assert not denoiser.can_resume(PARAMS, changed)
        with pytest.raises(ValueError, match="cannot resume after step 4 of 9 with"):
            render(OPTIONS[name], resume=changed)
    plain = Counted().denoiser(SamplingOptions())
    assert not plain.can_resume(PARAMS, state)
    assert plain.can_resume(PARAMS, StepState(4, state.latents))


def test_the_bits_of_a_video_do_not_depend_on_the_batch():
    """P3: the state of each video is its own."""
    seeds, texts = (3, 4), ([random_text(31), random_text(7)], [random_text(12), random_text(12)])
    batch = [replace(PARAMS, seed=seed) for seed in seeds]
    model, mesh = random_dit(CONFIG, seed=1), SequenceMesh.single()
    *_, both = sampler.trajectory(model, batch, *texts, mesh=mesh, device=CPU, options=OPTIONS["both"])
    for latents, params, positive, negative in zip(both, batch, *texts, strict=True):
        one = ([params], [positive], [negative])
        *_, alone = sampler.trajectory(model, *one, mesh=mesh, device=CPU, options=OPTIONS["both"])
        assert torch.equal(alone[0], latents)


def test_no_state_crosses_samples():
    """P3: rows of another size, other steps and other guidance in between change no bit."""
    denoiser = Counted().denoiser(OPTIONS["both"])
    others = (
        replace(PARAMS, height=48, num_frames=1),
        replace(PARAMS, num_inference_steps=4),
        replace(PARAMS, cfg_scale=1.0),
    )
    for params in (PARAMS, *others, PARAMS):
        alone, shared = (render(OPTIONS["both"], params, denoiser=one)[0] for one in (None, denoiser))
        assert np.array_equal(alone, shared)


@given(
    degree=st.integers(0, 2),
    correct=st.booleans(),
    steps=st.sets(st.integers(0, 29), min_size=4),
    coefficients=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
)
@settings(max_examples=30, deadline=None)
def test_a_polynomial_velocity_is_predicted_exactly(degree, correct, steps, coefficients):
    """A velocity that is a polynomial in the step number gives the result of all steps: predicted if the order is its
    degree, and corrected if the degree is at most two, whatever was predicted.
    """
    levels = sampler.sigmas(30, 7.0)

    def velocity(step):
        return torch.tensor([sum(c * (step / 30) ** power for power, c in enumerate(coefficients[: degree + 1]))])

    def run(schedule):
        cached, latents = StepCache(schedule, levels), torch.zeros(1)
        for step in range(30):
            if cached.is_computed(step):
                own = velocity(step)
                latents = cached.correct(step, latents, own)
            else:
                own = cached.predict(step)
            latents = sampler.euler_step(latents, own, levels[step], levels[step + 1])
        return latents

    known = {*range(degree + 1), *steps}  # the first steps give all the nodes that the polynomial needs
    exact = run(StepSchedule(computed=tuple(range(30)), of=30))
    order = 0 if correct else degree
    schedule = StepSchedule(computed=tuple(known), of=30, order=order, correct=correct)
    assert torch.allclose(run(schedule), exact, atol=1e-3)
