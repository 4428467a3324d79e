"""The cost of sparse attention in the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hv_batch.attention_methods import AttentionMethods, SparseAttention
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.cost_model.flops import attention_flops, denoise_flops, linear_flops
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.speed import denoise_seconds
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan

HD = Workload((720, 1280, 129), 50, 1)
OPTIONS = {"sparse_attention": {"density": 0.25}}


def test_work_scales_with_the_mean_density():
    """10 of 50 steps are dense, the others compute a quarter of the attention: 0.4 of it, and all matrix products."""
    dense, sparse = ModelShape(), ModelShape.from_options(OPTIONS)
    assert sparse.methods.mean_density(50) == pytest.approx(0.4)
    expected = 50 * (linear_flops(dense, HD.tokens) + 0.4 * attention_flops(dense, HD.tokens))
    assert denoise_flops(sparse, HD) == pytest.approx(expected)
    seconds = [denoise_seconds(GPUS["h100"], model, HD, ParallelPlan()) for model in (dense, sparse)]
    assert seconds[1] / seconds[0] == pytest.approx(denoise_flops(sparse, HD) / denoise_flops(dense, HD), rel=1e-6)


def test_density_1_costs_what_dense_attention_costs():
    """The estimate without the option is unchanged."""
    all_kept = replace(ModelShape(), methods=AttentionMethods(SparseAttention(density=1.0)))
    plan = ParallelPlan(ulysses_degree=8)
    assert denoise_seconds(GPUS["h100"], all_kept, HD, plan) == denoise_seconds(GPUS["h100"], ModelShape(), HD, plan)


def test_wrong_options_are_left_to_the_engine():
    """The engine reports them; the cost model computes as without the option."""
    assert ModelShape.from_options({"sparse_attention": {"density": 7}}) == ModelShape()
