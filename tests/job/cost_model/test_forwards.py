"""The passes through the DiT that the plan counts: computed steps, guidance branches, density of the attention."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.attention_methods import AttentionMethods, SparseAttention
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.cost_model.flops import attention_flops, denoise_flops, linear_flops, mean_density
from hv_batch.job.cost_model.model import ForwardKind, ModelShape
from hv_batch.job.cost_model.speed import denoise_seconds
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan
from hv_batch.step_schedule import computed_steps, guided_steps

HD = Workload((720, 1280, 129), 50, 1)
OPTIONS = {"sparse_attention": {"density": 0.25}}


def test_work_scales_with_the_mean_density():
    """10 of 50 steps are dense, the others compute a quarter of the attention: 0.4 of it, and all matrix products."""
    dense, sparse = ModelShape(), ModelShape.from_options(OPTIONS)
    assert mean_density(sparse, HD) == pytest.approx(0.4)
    expected = 50 * (linear_flops(dense, HD.tokens) + 0.4 * attention_flops(dense, HD.tokens))
    assert denoise_flops(sparse, HD) == pytest.approx(expected)
    seconds = [denoise_seconds(GPUS["h100"], model, HD, ParallelPlan()) for model in (dense, sparse)]
    assert seconds[1] / seconds[0] == pytest.approx(denoise_flops(sparse, HD) / denoise_flops(dense, HD), rel=1e-6)


@given(computed=st.none() | st.integers(2, 50), until=st.none() | st.floats(0.01, 0.99), steps=st.integers(1, 100))
def test_forwards_are_counted_by_branch_and_density(computed, until, steps):
    """A computed step runs the negative branch before `cfg_until` only, and its attention is sparse after the start."""
    cache = None if computed is None else {"kind": "schedule", "computed": computed}
    model = ModelShape.from_options(OPTIONS | {"step_cache": cache, "cfg_until": until})
    schedule = computed_steps(model.step_cache, steps)
    dense = [step for step in schedule if step < math.ceil(0.2 * steps)]
    both = [step for step in schedule if step < guided_steps(until, steps)]
    forwards = model.forwards(Workload((64, 64, 5), steps, 2))
    assert 0 in dense
    assert 0 in both
    assert forwards.total() == len(schedule) + len(both)
    assert forwards[ForwardKind()] == len(dense) + len(set(dense) & set(both))
    assert model.forwards(Workload((64, 64, 5), steps, 1)).total() == len(schedule)


def test_8_bit_attention_is_counted_in_the_steps_that_use_it():
    """The first tenth of the steps and the last one are exact; the others attend at the speed of the 8-bit kernel."""
    dense, quantized = ModelShape(), ModelShape.from_options({"quantized_attention": {"qk": "int8"}})
    assert quantized.forwards(HD) == {ForwardKind(): 6, ForwardKind(is_quantized=True): 44}
    assert denoise_flops(quantized, HD) == denoise_flops(dense, HD)
    with_dense, with_quantized = (
        denoise_seconds(GPUS["h100"], model, HD, ParallelPlan()) for model in (dense, quantized)
    )
    gain = GPUS["h100"].quantized_gain
    attending = denoise_seconds(GPUS["h100"], dense, HD, ParallelPlan()) * attention_flops(dense, HD.tokens)
    attending /= attention_flops(dense, HD.tokens) + linear_flops(dense, HD.tokens)
    assert with_dense - with_quantized == pytest.approx(44 / 50 * attending * (1 - 1 / gain), rel=1e-3)


def test_density_1_costs_what_dense_attention_costs():
    """The estimate without the option is unchanged."""
    all_kept = replace(ModelShape(), methods=AttentionMethods(SparseAttention(density=1.0)))
    plan = ParallelPlan(ulysses_degree=8)
    assert denoise_seconds(GPUS["h100"], all_kept, HD, plan) == denoise_seconds(GPUS["h100"], ModelShape(), HD, plan)


def test_wrong_options_are_left_to_the_engine():
    """The engine reports them; the cost model computes as without the option."""
    assert ModelShape.from_options({"sparse_attention": {"density": 7}}) == ModelShape()
