"""LocalGroup renders the latents of one rank, stops all ranks at one step, and stops at the first failure of a rank."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.local_group import LocalGroup, RankFailed
from hv_batch.engine.pipeline import HunyuanVideoPipeline, Interrupted
from hv_batch.protocol import ParallelPlan, UserError
from hv_batch.toy.checkpoint import write_toy_checkpoint

FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
CHOICE = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "cfg_scale": 2.0, "output": "latents"}
PROMPT = "A cat walks on the grass, realistic."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


def test_a_group_renders_and_can_be_interrupted_and_fails_with_a_lost_rank(base):
    """Spec section 8, P4: the group renders what one rank renders, up to rounding. An interrupt stops all ranks at one
    step, and the group stays usable. A killed rank stops the group with an error that names it, instead of a hang."""
    alone = HunyuanVideoPipeline.from_pretrained(base, device="cpu", noise="official", **FP32)
    expected = alone(PROMPT, **CHOICE)
    with HunyuanVideoPipeline.from_pretrained(
        base, device="cpu", ulysses_degree=2, noise="official", **FP32
    ) as pipeline:
        first = pipeline(PROMPT, **CHOICE)
        np.testing.assert_allclose(first, expected, rtol=0, atol=1e-4)
        steps = []

        def stop(step, latents):
            steps.append((step, latents.shape))
            if step == 2:
                pipeline.interrupt()

        with pytest.raises(Interrupted, match="after step 2 of 4"):
            pipeline(PROMPT, num_videos=2, batch_size=2, callback=stop, **CHOICE)
        assert steps == [(1, (2, 16, 2, 4, 6)), (2, (2, 16, 2, 4, 6))]
        assert np.array_equal(pipeline(PROMPT, **CHOICE), first)

        victim = pipeline._denoiser._processes[1]
        with pytest.raises(RankFailed, match=r"rank 1 exited without reporting an error \(exit code -9\)"):
            pipeline(PROMPT, callback=lambda step, _: os.kill(victim.pid, signal.SIGKILL), **CHOICE)
        with pytest.raises(RankFailed, match="this group has been stopped"):
            pipeline(PROMPT, **CHOICE)


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


class FailingEngine:
    """Rank 1 raises in `join`; rank 0 would wait for it."""

    def group_problems(self, _plan):
        return []

    def host_rendezvous(self, _host, _world_size):
        return "nowhere"

    def join(self, spec):
        assert spec.address == "nowhere"
        if spec.rank == 1:
            raise ValueError("broken weights")
        time.sleep(600)


def test_the_first_error_is_raised():
    """P6: the error of the rank that failed first is raised, without waiting for the other ranks."""
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed first:.*Traceback.*ValueError: broken weights"):
        LocalGroup(FailingEngine(), "cpu", ParallelPlan(ulysses_degree=2))


def test_degrees_that_do_not_divide_the_heads_start_no_process(base):
    """P6: the plan is validated before any process starts."""
    with pytest.raises(UserError, match="ulysses_degree 3 does not divide"):
        LocalGroup(HunyuanVideo(model_base=base), "cpu", ParallelPlan(ulysses_degree=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_a_user_error_of_a_rank_is_raised_without_traceback(base):
    """P6: a UserError of a rank is raised in the parent with the same text."""
    with pytest.raises(UserError, match=r"^device 'cuda' needs GPU number 0, but this process sees 0 GPUs"):
        LocalGroup(HunyuanVideo(model_base=base), "cuda", ParallelPlan())
