"""hv_batch.job.cost_model.group_plan: which plans a config allows, which `auto` chooses, and that a run keeps them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hv_batch.job.config.group_rules import GROUP_SIZES
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.group_plan import explain_choice
from hv_batch.job.cost_model.memory import GIB, denoiser_footprint
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.cost_model.speed import denoise_seconds
from hv_batch.job.records.run_identity import recorded_plans, run_identity
from hv_batch.job.workload import Workload, count_tokens
from hv_batch.protocol import ParallelPlan, UserError

RELEASED = ModelShape()
HD, SD, IMAGE = (720, 1280, 129), (544, 960, 129), (720, 1280, 1)
SHAPES = st.tuples(
    st.integers(4, 80).map(lambda n: 16 * n),
    st.integers(4, 80).map(lambda n: 16 * n),
    st.integers(0, 64).map(lambda n: 4 * n + 1),
)


def auto(**sections):
    """A config with parallel.gpus_per_group: auto."""
    sections = {"gpu": "H100", "gpu_memory_gib": 79.6, **sections}
    sections["parallel"] = {"gpus_per_group": "auto", **sections.get("parallel", {})}
    return RunConfig.model_validate(sections)


def plan_for(config, shape):
    return resolve_run(config, [shape]).groups.largest


def need_gib(shape, ranks):
    return denoiser_footprint(RELEASED, count_tokens(shape), ranks, 1).total / GIB


# ---- one plan for all shapes


@pytest.mark.parametrize(
    ("parallel", "nodes", "plan"),
    [
        ({}, 1, (8, 1, 1)),
        ({"gpus_per_group": 8}, 1, (8, 1, 1)),
        ({"gpus_per_group": 4}, 1, (4, 1, 1)),
        ({"gpus_per_group": 16}, 1, (8, 2, 1)),
        ({"gpus_per_group": 5}, 1, (1, 5, 1)),
        ({"gpus_per_group": 8, "cfg_degree": 2}, 1, (4, 1, 2)),
        ({"gpus_per_group": 8, "ulysses_degree": 2}, 1, (2, 4, 1)),
        ({"gpus_per_group": 8, "ring_degree": 4}, 1, (2, 4, 1)),
        ({"gpus_per_group": 8}, 2, (4, 2, 1)),
        ({"gpus_per_group": 16, "cfg_degree": 2}, 4, (4, 2, 2)),
        ({"gpus_per_group": 8, "cfg_degree": 2}, 2, (4, 1, 2)),
        ({"ring_degree": 2}, 1, (8, 2, 1)),
    ],
)
def test_degrees_are_chosen_for_a_size(parallel, nodes, plan):
    """Design section 5: the largest Ulysses degree that divides the heads and fits a node; given degrees are kept."""
    config = RunConfig.model_validate({"parallel": parallel, "groups": {"nodes_per_group": nodes}})
    assert resolve_run(config).fixed_plan == ParallelPlan(
        ulysses_degree=plan[0], ring_degree=plan[1], cfg_degree=plan[2]
    )
    assert plan_for(config, HD) == resolve_run(config).fixed_plan
    assert resolve_run(config, [HD, SD]).groups.size_class(SD) == 0


@pytest.mark.parametrize("parallel", [{}, {"gpus_per_group": 8}, {"ulysses_degree": 8, "gpus_per_group": 8}])
def test_the_identity_is_that_of_the_degrees(parallel):
    """P2, P3: roots of versions without gpus_per_group can be resumed, however the config writes the same plan."""
    config = RunConfig.model_validate({"parallel": parallel})
    assert run_identity(resolve_run(config))["parallel"] == {"device": "cuda", "ulysses_degree": 8, "ring_degree": 1}
    assert run_identity(resolve_run(RunConfig.model_validate(config.model_dump(mode="json")))) == run_identity(
        resolve_run(config)
    ), "as resume reads it"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parallel": {"gpus_per_group": 8, "ulysses_degree": 4, "ring_degree": 1}}, "degrees whose product is 8"),
        (
            {"parallel": {"gpus_per_group": 8, "ulysses_degree": 3}},
            "= 8 with ulysses_degree = 3, cfg_degree = 1; allowed: degrees whose product is 8",
        ),
        ({"parallel": {"gpus_per_group": 3, "cfg_degree": 2}}, "degrees whose product is 3"),
        ({"parallel": {"gpus_per_group": 0}}, "a whole number from 1 to 10000, auto, or null"),
        ({"parallel": {"gpus_per_group": "many"}}, "a whole number from 1 to 10000, auto, or null"),
        ({"parallel": {"gpus_per_group": True}}, "a whole number from 1 to 10000, auto, or null"),
        ({"parallel": {"gpus_per_group": 4}, "groups": {"nodes_per_group": 3}}, "a number of ranks that 3 divides"),
        ({"parallel": {"gpus_per_group": 4, "ulysses_degree": 4}, "groups": {"nodes_per_group": 2}}, "1 x 4, 2 x 2"),
        ({"groups": {"max_sample_minutes": 9}}, "together with parallel.gpus_per_group = auto"),
        ({"gpu": "RTX 9090"}, "H100, H200, A100, H20, L40S"),
    ],
)
def test_contradictory_sizes_are_refused(values, message):
    """P6: each message names what is allowed."""
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(values)
    assert message in str(caught.value)


def test_all_requirements_of_auto_are_reported_at_once():
    """P6: another engine, unknown GPUs, given degrees, several nodes and colocated encoders, in one error."""
    values = {
        "model": {"engine": "my.engine:Engine"},
        "parallel": {"gpus_per_group": "auto", "ulysses_degree": 8},
        "groups": {"nodes_per_group": 2},
        "encoders": {"placement": "colocated", "gpus": 0.3},
    }
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(values)
    for expected in (
        "which has no cost model",
        "auto without gpu and gpu_memory_gib; allowed: auto with both keys",
        "because auto chooses them for every shape",
        "among groups that fit on one node",
        "with encoders.placement = colocated; allowed: pool, because the number of encoders",
    ):
        assert expected in str(caught.value)


# ---- auto


def test_the_smallest_group_that_fits_is_the_cheapest():
    """Published H100 figures: 8 groups of 1 render 42 % more than one of 8. Only memory requires a larger group."""
    assert plan_for(auto(), HD).world_size == 1
    assert plan_for(auto(gpu_memory_gib=32), HD).world_size == 2
    assert plan_for(auto(gpu_memory_gib=32), IMAGE).world_size == 1


def test_a_maximum_duration_requires_larger_groups():
    """groups.max_sample_minutes: 720p takes 30 minutes on one H100. If no group is fast enough, the fastest is used."""
    sizes = {
        minutes: plan_for(auto(groups={"max_sample_minutes": minutes}), HD).world_size for minutes in (40, 20, 10, 5, 1)
    }
    assert sizes == {40: 1, 20: 2, 10: 4, 5: 8, 1: 8}
    twice_the_steps = auto(groups={"max_sample_minutes": 20}, defaults={"num_inference_steps": 100})
    assert plan_for(twice_the_steps, HD).world_size == 4


def test_cfg_degree_is_kept():
    """With parallel.cfg_degree: 2, every group has two halves, so the smallest has two ranks."""
    halves = auto(parallel={"cfg_degree": 2}, defaults={"cfg_scale": 3.0})
    assert plan_for(halves, IMAGE) == ParallelPlan(cfg_degree=2)


@settings(max_examples=200)
@given(
    shape=SHAPES,
    gib=st.floats(20, 150),
    gpu=st.sampled_from(sorted(GPUS)),
    minutes=st.none() | st.floats(0.1, 200),
    cfg=st.sampled_from([1, 2]),
)
def test_a_chosen_group_fits_and_none_is_cheaper(shape, gib, gpu, minutes, cfg):
    """Property: the group fits; of the sizes that fit and are fast enough, it costs the fewest GPU seconds."""
    config = auto(gpu=gpu, gpu_memory_gib=gib, groups={"max_sample_minutes": minutes}, parallel={"cfg_degree": cfg})
    fitting = [n for n in GROUP_SIZES if n % cfg == 0 and need_gib(shape, n // cfg) <= gib]
    if not fitting:
        with pytest.raises(UserError, match="does not fit into GPU memory"):
            plan_for(config, shape)
        return
    chosen = plan_for(config, shape).world_size
    assert chosen in fitting
    seconds = {
        n: denoise_seconds(
            GPUS[gpu], RELEASED, Workload(shape, 50, cfg), ParallelPlan(ulysses_degree=n // cfg, cfg_degree=cfg)
        )
        for n in fitting
    }
    quick = [n for n in fitting if seconds[n] <= 60 * (minutes or 1e9)]
    if quick:
        assert chosen in quick
        assert seconds[chosen] * chosen == min(seconds[n] * n for n in quick)
    else:
        assert seconds[chosen] == min(seconds.values())


@settings(max_examples=100)
@given(shape=SHAPES, gib=st.floats(30, 150), more=st.floats(0, 50), minutes=st.floats(1, 200), later=st.floats(0, 100))
def test_looser_bounds_never_require_larger_groups(shape, gib, more, minutes, later):
    """Property: with more memory per GPU or more time, no shape gets a larger group."""
    tight, loose = (
        auto(gpu_memory_gib=memory, groups={"max_sample_minutes": bound})
        for memory, bound in ((gib, minutes), (gib + more, minutes + later))
    )
    try:
        before = plan_for(tight, shape).world_size
    except UserError:
        return
    assert plan_for(loose, shape).world_size <= before


def test_all_shapes_that_fit_no_group_are_reported_at_once():
    """P6: every shape with the memory that it needs, and the remedy."""
    with pytest.raises(UserError) as caught:
        resolve_run(auto(gpu_memory_gib=24), [HD, SD, IMAGE])
    text = str(caught.value)
    assert text.count("GiB on each rank of the largest group, of 8") == 3
    assert "720x1280x129 needs about" in text
    assert "offload" in text


def test_size_classes_are_sorted_largest_first():
    """Each shape has a size class, and each plan its shapes."""
    sizes = resolve_run(auto(gpu_memory_gib=32), [IMAGE, HD, SD]).groups
    assert [plan.world_size for plan in sizes.plans] == [2, 1]
    assert sizes.largest.world_size == 2
    assert [sizes.size_class(shape) for shape in (HD, SD, IMAGE)] == [0, 1, 1]
    assert sizes.shapes(sizes.plans[1]) == [SD, IMAGE]


def test_every_choice_is_explained():
    """`hv-batch plan` reports why a shape has its group size."""
    config = auto(gpu_memory_gib=32, groups={"max_sample_minutes": 10})
    slow = auto(gpu="L40S", groups={"max_sample_minutes": 5})
    assert explain_choice(resolve_run(config), IMAGE) == "the cheapest"
    assert explain_choice(resolve_run(config), HD) == "smaller groups take longer than 10 min"
    assert explain_choice(resolve_run(slow), HD) == "the fastest, although it takes longer than 5 min"
    assert explain_choice(resolve_run(auto(gpu_memory_gib=32)), HD) == "smaller groups have too little memory"
    assert explain_choice(resolve_run(RunConfig()), HD) == ""


# ---- a run keeps its plans


def test_the_identity_names_the_plan_of_every_shape():
    """P3: the identity contains the resolved plans, not "auto", and recorded_plans reads them back."""
    config = auto(gpu_memory_gib=32)
    run = resolve_run(config, [HD, IMAGE])
    identity = json.loads(json.dumps(run_identity(run)))
    one = {"ring_degree": 1, "cfg_degree": 1}
    plans = {"720x1280x1": {"ulysses_degree": 1, **one}, "720x1280x129": {"ulysses_degree": 2, **one}}
    assert identity["parallel"] == {"device": "cuda", "plans": plans}
    assert recorded_plans(identity) == run.groups.by_shape
    assert recorded_plans(run_identity(resolve_run(RunConfig()))) == {}


def test_recorded_plans_are_kept():
    """P3: a resumed run uses the plans of its run.json, even if the cost model would choose others now."""
    recorded = resolve_run(auto(gpu_memory_gib=32), [HD, IMAGE]).groups.by_shape
    now = auto(groups={"max_sample_minutes": 5})
    assert resolve_run(now, [HD, IMAGE]).groups.by_shape != recorded
    kept = resolve_run(now, [HD, IMAGE, SD], recorded).groups.by_shape
    assert {shape: kept[shape] for shape in recorded} == recorded
    assert kept[SD] == plan_for(now, SD), "a shape without a recorded plan gets a new one"
    halves = auto(parallel={"cfg_degree": 2})
    assert resolve_run(halves, [HD], recorded).groups.largest.cfg_degree == 2, "another cfg_degree is another run"
