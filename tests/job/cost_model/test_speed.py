"""The estimated speeds: the measurements that they are fitted to, and what holds for any group."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.config.hardware import GPUS, find_gpu
from hv_batch.job.cost_model.flops import exchange_bytes, plan_ranks, rank_traffic
from hv_batch.job.cost_model.memory import denoiser_footprint
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.speed import HOST_LINK, decode_seconds, denoise_seconds, forward_seconds
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan, UserError

RELEASED = ModelShape()
HD = Workload((720, 1280, 129), 50, 1)
SQUARE = Workload((960, 960, 129), 50, 1)
DECODE_S = 115  # of the released code, which decodes on every rank: what its series extrapolate to at infinitely many

PUBLISHED = [  # GPU, work, {ranks: seconds}
    ("h100", HD, {1: 1904, 2: 930, 4: 514, 8: 338}),
    ("h20", HD, {1: 6639, 2: 3401, 4: 1763, 8: 941}),
    ("h100", SQUARE, {1: 1735, 2: 934, 3: 645, 6: 367}),
    ("a100", HD, {1: 3000}),
]


@pytest.mark.parametrize(("gpu", "work", "series"), PUBLISHED)
def test_the_published_series_are_met(gpu, work, series):
    """Efficiencies and link speeds are fitted: the estimates are within 13 % of every published figure."""
    for ranks, seconds in series.items():
        predicted = denoise_seconds(GPUS[gpu], RELEASED, work, ParallelPlan(ulysses_degree=ranks)) + DECODE_S
        assert predicted == pytest.approx(seconds, rel=0.13), ranks


def test_the_published_speedup_without_decoding_is_met():
    """H800, DiT only: 1625 s to 225 s on eight."""
    work = Workload((720, 1280, 125), 50, 1)
    alone, eight = (denoise_seconds(GPUS["h100"], RELEASED, work, ParallelPlan(ulysses_degree=n)) for n in (1, 8))
    assert alone / eight == pytest.approx(1625 / 225, rel=0.1)


@pytest.mark.parametrize(("shape", "seconds"), [((544, 960, 129), 4.81), ((720, 1280, 129), 9.00)])
def test_the_timed_decodes_are_met(shape, seconds):
    """`hv-batch bench engine --stage vae` on an H100."""
    assert decode_seconds(GPUS["h100"], RELEASED, Workload(shape, 50, 1)) == pytest.approx(seconds, rel=0.03)


@given(st.sampled_from(sorted(GPUS)), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.integers(1, 33))
def test_more_ranks_are_never_slower_nor_superlinear(gpu, ulysses, ring, scale):
    """The choice of a group depends on it: time decreases with ranks, and GPU seconds do not."""
    tokens = 3600 * scale
    alone = forward_seconds(GPUS[gpu], RELEASED, tokens, 1, 1)
    group = forward_seconds(GPUS[gpu], RELEASED, tokens, ulysses, ring)
    assert group >= alone / (ulysses * ring) * 0.999
    smaller, larger = (denoiser_footprint(RELEASED, tokens, u, 1).total for u in (8, 1))
    assert smaller < larger


def test_the_published_efficiency_of_eight_is_met():
    """Spec section 9: 5.64 times one H100, in runs that also decode, on every rank; denoising alone loses less."""
    alone, eight = (denoise_seconds(GPUS["h100"], RELEASED, HD, ParallelPlan(ulysses_degree=n)) for n in (1, 8))
    assert (alone + DECODE_S) / (eight + DECODE_S) == pytest.approx(5.64, rel=0.05)
    assert 0.9 < alone / eight / 8 < 1


@given(st.sampled_from(sorted(GPUS)), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 33))
def test_halves_of_a_group_exchange_only_velocities(gpu, ulysses, ring, scale):
    """Two branches on two halves take the time of one branch on one half plus one velocity transfer per step."""
    work = Workload((16 * 60 * scale, 16 * 60, 1), 50, 2)
    half = ParallelPlan(ulysses_degree=ulysses, ring_degree=ring)
    whole = replace(half, cfg_degree=2)
    seconds = {plan: denoise_seconds(GPUS[gpu], RELEASED, work, plan) for plan in (half, whole)}
    wire = 50 * exchange_bytes(RELEASED, work.tokens) / GPUS[gpu].link
    assert seconds[whole] == pytest.approx(seconds[half] / 2 + wire)
    assert exchange_bytes(RELEASED, 118_800) == 118_800 * 64 * 2


# Seconds of a step with "sdpa" and with "cudnn", on one GPU (PyTorch 2.11, 2026-11-26): `hv-batch bench engine`.
STEPS_SEEN = [
    ("h100", (720, 1280, 129), 33.49, 22.40),
    ("h100", (544, 960, 129), 11.81, 8.17),
    ("h200", (544, 960, 129), 11.49, 8.04),
]


@pytest.mark.parametrize(("gpu", "shape", "sdpa", "cudnn"), STEPS_SEEN)
def test_the_steps_that_were_timed_are_met(gpu, shape, sdpa, cudnn):
    """Measured steps; only the speed of cuDNN's attention was fitted to them."""
    step = Workload(shape, 1, 1)
    for name, seen in (("sdpa", sdpa), ("cudnn", cudnn)):
        predicted = denoise_seconds(GPUS[gpu], replace(RELEASED, attention=name), step, ParallelPlan())
        assert predicted == pytest.approx(seen, rel=0.15), name


def test_streaming_weights_bounds_a_short_step():
    """With offloading, a step takes at least as long as the transfer of 25 GB; a long step hides it."""
    gpu, offloaded = GPUS["h100"], ModelShape(offload=True)
    arrival = offloaded.streamed_bytes / HOST_LINK
    assert forward_seconds(gpu, offloaded, 3600, 1, 1) == arrival > forward_seconds(gpu, RELEASED, 3600, 1, 1)
    assert forward_seconds(gpu, offloaded, 118_800, 1, 1) == forward_seconds(gpu, RELEASED, 118_800, 1, 1) > arrival


def test_ranks_are_planned_for_ulysses_first():
    """Design section 5: the Ulysses degree divides the heads; the ring has the remaining factor."""
    assert [plan_ranks(24, ranks) for ranks in (1, 2, 4, 8, 16, 5)] == [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (1, 5)]
    assert rank_traffic(RELEASED, 118_800, 1, 1).total == 0


def test_an_unknown_gpu_is_reported_with_the_known_ones():
    """P6: the message names what is allowed."""
    assert find_gpu("h100").name == "H100"
    with pytest.raises(UserError, match=r"known are H100, H200, A100, H20, L40S"):
        find_gpu("RTX 9090")
