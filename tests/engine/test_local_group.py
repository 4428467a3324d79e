"""A group of local processes: the same latents as one rank, stopped at one step, and gone with its first failure."""

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


def test_a_group_renders_stops_and_ends_with_its_first_loss(base):
    """Spec section 8, P4: within rounding of one rank; an interrupt stops all ranks at one step and spares the group;
    a killed rank ends it and is named, instead of a hang."""
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
        with pytest.raises(RankFailed, match=r"rank 1 died without a word \(exit code -9\)"):
            pipeline(PROMPT, callback=lambda step, _: os.kill(victim.pid, signal.SIGKILL), **CHOICE)
        with pytest.raises(RankFailed, match="this group has ended"):
            pipeline(PROMPT, **CHOICE)


def test_two_halves_render_what_one_rank_renders(base):
    """P3: with a guidance branch for each process, not one bit differs; P6: without guidance it is refused by name."""
    alone = HunyuanVideoPipeline.from_pretrained(base, device="cpu", noise="official", **FP32)
    with HunyuanVideoPipeline.from_pretrained(base, device="cpu", cfg_degree=2, noise="official", **FP32) as pipeline:
        with pytest.raises(UserError, match=r"cfg_scale is 1\.0, allowed is above 1 with cfg_degree 2"):
            pipeline(PROMPT, **{**CHOICE, "cfg_scale": 1.0})
        two = {**CHOICE, "num_videos": 2, "batch_size": 2}
        assert np.array_equal(pipeline(PROMPT, **two), alone(PROMPT, **two))
    with pytest.raises(UserError, match="cfg_degree is 3, allowed is 1 or 2"):
        HunyuanVideoPipeline.from_pretrained(base, device="cpu", cfg_degree=3)


class FailingEngine:
    """Rank 1 fails while rank 0 would wait for it for ever."""

    def group_problems(self, _plan):
        return []

    def host_rendezvous(self, _host, _world_size):
        return "nowhere"

    def join(self, spec):
        assert spec.address == "nowhere"
        if spec.rank == 1:
            raise ValueError("broken weights")
        time.sleep(600)


def test_the_first_error_is_what_the_user_sees():
    """P6: the reason of the rank that failed, and no waiting for the others."""
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed first:.*Traceback.*ValueError: broken weights"):
        LocalGroup(FailingEngine(), "cpu", ParallelPlan(ulysses_degree=2))


def test_degrees_that_do_not_fit_start_no_process(base):
    """P6: the heads are counted first."""
    with pytest.raises(UserError, match="ulysses_degree 3 does not divide"):
        LocalGroup(HunyuanVideo(model_base=base), "cpu", ParallelPlan(ulysses_degree=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_a_rank_without_its_gpu_says_so(base):
    """P6: what the user can mend reaches the user in the engine's own words, without a traceback."""
    with pytest.raises(UserError, match=r"^device 'cuda' was asked for, but this process sees 0 GPUs"):
        LocalGroup(HunyuanVideo(model_base=base), "cuda", ParallelPlan())
