"""hv_batch.job.cost_model.resolver: a config is resolved in one place, for all code that runs after it."""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError
from functools import cache

import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan
from tests.support.repository import ROOT

HD, IMAGE = (720, 1280, 129), (720, 1280, 1)
SAMPLE_COMMAND = "hv_batch/cli/sample/command.py"
BENCHES = "hv_batch/bench/"
RESOLVER = "hv_batch/job/cost_model/resolver.py"
SECTIONS = "hv_batch/job/config/sections.py"
VALIDATION = "hv_batch/job/config/run_config.py"


@cache
def syntax_trees():
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8"))
        for path in sorted((ROOT / "hv_batch").rglob("*.py"))
    }


def nodes(kind):
    """(file, node) of every syntax node of this kind in the package."""
    return [(path, node) for path, tree in syntax_trees().items() for node in ast.walk(tree) if isinstance(node, kind)]


def name_of(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def test_placements_are_compared_in_one_place():
    """Only one property of each section reads `placement`, so no other code can compare it."""
    readers = [path for path, node in nodes(ast.Attribute) if node.attr == "placement"]
    assert readers == [SECTIONS] * 2


def test_only_the_resolver_asks_whether_groups_decode():
    """Besides the validation of the config; all other code reads ResolvedRun.groups_decode."""
    readers = {path for path, node in nodes(ast.Attribute) if node.attr == "is_in_group"}
    assert readers == {RESOLVER, VALIDATION}


@pytest.mark.parametrize("function", ["fixed_plan", "from_options", "choose_plans"])
def test_decisions_are_made_by_the_resolver_alone(function):
    """A second caller could decide from other values than the run has. `hv-batch sample` and benches have no run."""
    callers = [path for path, node in nodes(ast.Call) if name_of(node.func) == function]
    assert [path for path in callers if path != SAMPLE_COMMAND and not path.startswith(BENCHES)] == [RESOLVER]


def test_a_resolved_run_cannot_change():
    """The driver and all actors read the same decisions."""
    run = resolve_run(RunConfig())
    with pytest.raises(FrozenInstanceError):
        run.groups_decode = True


@pytest.mark.parametrize(
    ("encoders", "decoders", "pools"),
    [
        ("pool", "pool", {Stage.ENCODE, Stage.DECODE}),
        ("pool", "group", {Stage.ENCODE}),
        ("colocated", "pool", {Stage.DECODE}),
        ("colocated", "group", set()),
    ],
)
def test_the_stages_with_actors_of_their_own(encoders, decoders, pools):
    """encoders.placement and decoders.placement decide which stages reserve resources outside the groups."""
    values = {"encoders": {"placement": encoders, "gpus": 0.25}, "decoders": {"placement": decoders}}
    run = resolve_run(RunConfig.model_validate(values))
    assert set(run.pools) == pools
    assert run.groups_decode == (decoders == "group") == (run.max_workers[Stage.DECODE] == 0)
    assert run.rank_gpus == (0.75 if encoders == "colocated" else 1.0)
    assert run.colocated_per_node == (1 if encoders == "colocated" else 0)


def test_a_plan_that_the_config_fixes_is_there_before_the_shapes_are():
    """So the engine can refuse it before the manifest is read; `auto` has no plan without a shape."""
    run = resolve_run(RunConfig.model_validate({"parallel": {"gpus_per_group": 4}}))
    assert run.groups.plans == (run.fixed_plan,) == (ParallelPlan(ulysses_degree=4),)
    auto = RunConfig.model_validate({"parallel": {"gpus_per_group": "auto"}, "gpu": "H100", "gpu_memory_gib": 32})
    assert (resolve_run(auto).fixed_plan, resolve_run(auto).groups.plans) == (None, ())
    assert [plan.world_size for plan in resolve_run(auto, [IMAGE, HD]).groups.plans] == [2, 1]


def test_smaller_groups_take_the_place_of_larger_ones():
    """groups.count bounds the GPUs: two groups of two ranks, or four of one."""
    values = {"parallel": {"gpus_per_group": "auto"}, "gpu": "H100", "gpu_memory_gib": 32, "groups": {"count": 2}}
    run = resolve_run(RunConfig.model_validate({**values, "decoders": {"count": "auto"}}), [HD, IMAGE])
    assert run.max_groups == 4
    assert run.max_workers == {Stage.ENCODE: 1, Stage.DENOISE: 4, Stage.DECODE: 8}


def test_options_of_another_engine_are_not_interpreted():
    """They may have any meaning there, so a value that this model could not have must not stop the run."""
    options = {"dit": 3, "step_cache": "on", "vae_tile": "large"}
    run = resolve_run(RunConfig.model_validate({"model": {"engine": "my.engine:Engine", "options": options}}))
    assert run.fixed_plan == ParallelPlan(ulysses_degree=8)
