"""LocalGroup renders the latents of one rank, stops all ranks at one step, and stops at the first failure of a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.local_group import LocalGroup, RankFailed
from hv_batch.engine.pipeline import HunyuanVideoPipeline, Interrupted
from hv_batch.engine.video_requests import plan_videos
from hv_batch.protocol import DeviceError, NonFiniteError, ParallelPlan, UserError
from hv_batch.toy.checkpoint import write_toy_checkpoint

CACHE = {"step_cache": {"kind": "schedule", "computed": 3, "of": 4}}
FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
CHOICE = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "cfg_scale": 2.0, "output": "latents"}
REST = {"negative_prompt": "", "guidance_scale": 6.0, "guidance_rescale": 0.0, "flow_shift": 7.0}
PROMPT = "A cat walks on the grass, realistic."
(PARAMS,) = plan_videos(PROMPT, 0, 1, **{name: value for name, value in CHOICE.items() if name != "output"}, **REST)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def group(base):
    """A pipeline of two ranks, which the tests leave usable."""
    with HunyuanVideoPipeline.from_pretrained(
        base, device="cpu", ulysses_degree=2, noise="official", attention="auto", **FP32, **CACHE
    ) as pipeline:
        yield pipeline


def test_the_ranks_choose_one_kernel_together(group):
    """P3: the identity names the kernel that the ranks have chosen for `attention: auto`."""
    assert group.identity() == {**group.engine.identity(), "attention": "sdpa"}


def test_an_error_of_the_video_arrives_with_its_own_class_and_leaves_the_group(group):
    """P5: latents that are not finite on all ranks raise NonFiniteError, not the text of a traceback. A call during a
    call raises an error instead of waiting for ever."""
    texts = group.encode([PARAMS])
    (expected,) = group.denoise([PARAMS], texts)
    broken = {text: replace(one, states=one.states * float("nan")) for text, one in texts.items()}
    with pytest.raises(NonFiniteError, match=r"^latents are not finite after step 1 of 4") as error:
        list(group.denoise([PARAMS], broken))
    assert "rank " in str(error.value.__cause__)
    assert "Traceback" in str(error.value.__cause__)
    processes = list(group._denoiser._processes)

    def call(_step, _latents):
        with pytest.raises(UserError, match="already rendering"):
            group(PROMPT, **CHOICE)

    (again,) = group.denoise([PARAMS], texts, callback=call)
    assert np.array_equal(again, expected)
    assert group._denoiser._processes == processes, "the ranks have not been started again"


def test_a_group_renders_and_can_be_interrupted_and_fails_with_a_lost_rank(base, group):
    """Spec section 8, P4: the group renders what one rank renders, up to rounding, with a step cache. An interrupt
    stops all ranks at one step, and the group stays usable. A killed rank stops the group with an error that names it,
    instead of a hang, and the next call of the pipeline starts a new group."""
    alone = HunyuanVideoPipeline.from_pretrained(base, device="cpu", noise="official", **FP32, **CACHE)
    expected = alone(PROMPT, **CHOICE)
    first = group(PROMPT, **CHOICE)
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-4)
    steps = []

    def stop(step, latents):
        steps.append((step, latents.shape))
        if step == 2:
            group.interrupt()

    with pytest.raises(Interrupted, match="after step 2 of 4"):
        group(PROMPT, num_videos=2, batch_size=2, callback=stop, **CHOICE)
    assert steps == [(1, (2, 16, 2, 4, 6)), (2, (2, 16, 2, 4, 6))]
    assert np.array_equal(group(PROMPT, **CHOICE), first)

    victim = group._denoiser._processes[1]
    with pytest.raises(RankFailed, match=r"rank 1 exited without reporting an error \(exit code -9\)"):
        group(PROMPT, callback=lambda step, _: os.kill(victim.pid, signal.SIGKILL), **CHOICE)
    stopped = group._denoiser
    with pytest.raises(RankFailed, match="this group has been stopped"):
        next(stopped.trajectory([PARAMS], [], None))
    assert np.array_equal(group(PROMPT, **CHOICE), first)
    assert group._denoiser is not stopped


@pytest.mark.slow
def test_cfg_degree_2_renders_what_one_rank_renders(base):
    """P3: with one guidance branch per process, every bit is equal. P6: without guidance, an error names the field."""
    alone = HunyuanVideoPipeline.from_pretrained(base, device="cpu", noise="official", **FP32)
    with HunyuanVideoPipeline.from_pretrained(base, device="cpu", cfg_degree=2, noise="official", **FP32) as pipeline:
        with pytest.raises(UserError, match=r"cfg_scale is 1\.0, allowed is above 1 with cfg_degree 2"):
            pipeline(PROMPT, **{**CHOICE, "cfg_scale": 1.0})
        two = {**CHOICE, "num_videos": 2, "batch_size": 2}
        assert np.array_equal(pipeline(PROMPT, **two), alone(PROMPT, **two))
    with pytest.raises(UserError, match="cfg_degree is 3, allowed is 1 or 2"):
        HunyuanVideoPipeline.from_pretrained(base, device="cpu", cfg_degree=3)


class UnpicklableError(Exception):
    def __init__(self, reason, code):
        super().__init__(reason)


class FailingEngine:
    """Rank 1 raises `error()` in `join`; rank 0 would wait for it."""

    def __init__(self, error):
        self.error = error

    def group_problems(self, _plan):
        return []

    def host_rendezvous(self, _host, _world_size):
        return "nowhere"

    def join(self, spec):
        assert spec.address == "nowhere"
        if spec.rank == 1:
            raise self.error()
        time.sleep(600)


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (partial(LookupError, "broken weights"), LookupError, "broken weights"),
        pytest.param(partial(DeviceError, "rank 1 is broken"), DeviceError, "rank 1 is broken", marks=pytest.mark.slow),
        pytest.param(
            partial(UnpicklableError, "broken", 3),
            RankFailed,
            "rank 1 failed first: UnpicklableError: broken",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_first_error_is_raised_with_its_class_and_message(error, raised, text):
    """P5: the error of the rank that failed first is raised, without waiting for the other ranks. The traceback of the
    rank is its cause. An error that cannot be sent is named."""
    with pytest.raises(raised) as caught:
        LocalGroup(FailingEngine(error), "cpu", ParallelPlan(ulysses_degree=2))
    assert type(caught.value) is raised
    assert str(caught.value) in (text, repr(text))
    assert "in join" in str(caught.value.__cause__)


SCRIPT = """
import sys
from hv_batch.engine.pipeline import HunyuanVideoPipeline
with HunyuanVideoPipeline.from_pretrained(sys.argv[1], device="cpu", ulysses_degree=2) as pipeline:
    pipeline("a cat", height=32, width=32, num_frames=1, num_inference_steps=1)
"""


@pytest.mark.slow
def test_a_missing_main_guard_is_named(base, tmp_path):
    """P6: a rank imports the script that starts it. Without the guard, or from standard input, the message says so."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py", base], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "UserError: The processes of a group import the script" in done.stderr
    assert 'Put its code below `if __name__ == "__main__":`.' in done.stderr
    assert done.stderr.count("Traceback") == 1
    done = subprocess.run([sys.executable, "-", base], input=SCRIPT, capture_output=True, text=True, timeout=300)
    assert "before it had started; its own output above has the reason" in done.stderr


def test_degrees_that_do_not_divide_the_heads_start_no_process(base):
    """P6: the plan is validated before any process starts."""
    with pytest.raises(UserError, match="ulysses_degree 3 does not divide"):
        LocalGroup(HunyuanVideo(model_base=base), "cpu", ParallelPlan(ulysses_degree=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_a_user_error_of_a_rank_is_raised_without_traceback(base):
    """P6: a UserError of a rank is raised in the parent with the same text."""
    with pytest.raises(UserError, match=r"^device 'cuda' needs GPU number 0, but this process sees 0 GPUs"):
        LocalGroup(HunyuanVideo(model_base=base), "cuda", ParallelPlan())
