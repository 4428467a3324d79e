"""hv_batch.job.cost_model.{sample_cost,recommend}: prices of samples, and the setups that a plan proposes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from hv_batch.attention_methods import AttentionMethods, SparseAttention
from hv_batch.cli.plan import render_plan
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.run_config import load_config
from hv_batch.job.cost_model.estimate import make_plan
from hv_batch.job.cost_model.recommend import MIN_STEPS, recommend, variants
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.cost_model.sample_cost import sample_gpu_seconds, total_gpu_seconds
from hv_batch.job.cost_model.speed import denoise_seconds
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan

H100 = GPUS["h100"]
VIDEO, SMALL = Workload((720, 1280, 129), 50, 1), Workload((544, 960, 129), 50, 2)


def run_of(config="throughput_1gpu", *overrides, work=(VIDEO,)):
    return resolve_run(load_config(config, overrides), [kind.shape for kind in work])


def proposed(run, work, gpus=64.0, price=None, gpu=H100):
    return recommend(run, Counter(work), gpu, gpus, price)


def test_the_price_of_a_manifest_is_the_sum_of_its_samples():
    """Prices are linear in GPU seconds, and the stages of all samples add up."""
    run = run_of(work=(VIDEO, SMALL))
    plans = dict.fromkeys((VIDEO, SMALL), ParallelPlan())
    one, other = (sample_gpu_seconds(H100, run.model, kind, plan, groups_decode=False) for kind, plan in plans.items())
    both = total_gpu_seconds(H100, run.model, Counter({VIDEO: 2, SMALL: 3}), plans, groups_decode=False)
    assert both.total == pytest.approx(2 * one.total + 3 * other.total)
    assert sum(both.shares().values()) == pytest.approx(1.0)
    assert other.encode == 2 * one.encode, "guidance encodes two prompts"


def test_few_steps_make_decode_and_text_matter():
    """Distilled weights: the share of decode and text grows as denoising shrinks, and no step can be left out."""
    few = replace(VIDEO, steps=6)
    shares = [
        sample_gpu_seconds(H100, run_of().model, kind, ParallelPlan(), groups_decode=False).shares()
        for kind in (VIDEO, few)
    ]
    assert shares[0]["decode"] < 0.01 < 0.05 < shares[1]["decode"]
    assert shares[1]["encode"] > 5 * shares[0]["encode"]
    assert [variant.name for variant in variants(run_of().model, Counter([few]), H100)] == ["as configured"]
    assert few.steps < MIN_STEPS
    more = proposed(run_of(), [few], gpus=64.0)["variants"][0]["setup"]["decoders"]
    assert more > proposed(run_of(), [VIDEO], gpus=64.0)["variants"][0]["setup"]["decoders"]


def test_a_setup_uses_the_gpus_and_keeps_groups_busy():
    """A setup fits into the GPUs, has no room for another group, and its pools keep up with its groups."""
    for gpus in (8.0, 17.0, 64.0, 1024.0):
        (variant, *_) = proposed(run_of(), [VIDEO], gpus)["variants"]
        setup = variant["setup"]
        assert gpus - 1 - setup["encoders"] < setup["gpus"] <= gpus
        denoise_s = denoise_seconds(H100, run_of().model, VIDEO, ParallelPlan())
        decode_s = sample_gpu_seconds(H100, run_of().model, VIDEO, ParallelPlan(), groups_decode=False).decode
        assert setup["decoders"] >= setup["groups"] / denoise_s * decode_s
    assert proposed(run_of("720p_8gpu"), [VIDEO], gpus=1.0)["best_exact"] is None


def test_the_group_is_the_smallest_that_fits_and_is_quick_enough():
    """P6: memory of the GPU, and groups.max_sample_minutes."""
    limit = ("groups.max_sample_minutes=6", "parallel.gpus_per_group=auto", "gpu=H100", "gpu_memory_gib=79.6")
    assert proposed(run_of(), [VIDEO])["variants"][0]["ranks"] == 1
    assert proposed(run_of("throughput_1gpu", *limit), [VIDEO])["variants"][0]["ranks"] == 4
    small = replace(H100, memory_gib=30.0)
    assert proposed(run_of(), [VIDEO], gpu=small)["variants"][0]["ranks"] == 4
    assert proposed(run_of(), [VIDEO], gpu=replace(H100, memory_gib=8.0))["best_exact"] is None


def test_methods_that_change_pixels_are_marked_and_never_the_exact_choice():
    """P3: step cache and sparse attention are shown with their gain; the recommendation is the fastest exact kernel."""
    found = proposed(run_of("throughput_1gpu", "model.options.attention=sdpa"), [VIDEO], price=2.0)
    by_name = {variant["name"]: variant for variant in found["variants"]}
    assert found["best_exact"] == "attention cudnn"
    assert by_name["attention cudnn"]["overrides"] == ["model.options.attention=cudnn"]
    exact = {name for name, variant in by_name.items() if variant["exact"]}
    assert exact == {"as configured", "attention cudnn"}
    hours = [by_name[name]["gpu_hours"] for name in ("as configured", "attention cudnn", "step cache, 16 of 50")]
    assert hours == sorted(hours, reverse=True)
    assert by_name["step cache, 16 of 50, sparse 0.3"]["gpu_hours"] < 0.25 * hours[1]
    assert by_name["as configured"]["cost_a_sample"] == pytest.approx(2.0 * hours[0])


def test_a_method_that_is_configured_is_not_proposed_again():
    model = run_of().model
    sparse = replace(model, methods=AttentionMethods(SparseAttention(density=0.5)))
    assert not any("sparse" in variant.name for variant in variants(sparse, Counter([VIDEO]), H100))
    assert not any("8-bit" in variant.name for variant in variants(sparse, Counter([VIDEO]), H100))


def test_a_gated_negative_branch_is_proposed_to_videos_that_have_one():
    """`cfg_until` saves nothing without CFG."""
    guided = replace(VIDEO, branches=2)
    found = {variant["name"]: variant["gpu_hours"] for variant in proposed(run_of(), [guided])["variants"]}
    assert found["CFG for 0.5 of the steps"] < 0.8 * found["as configured"]
    assert not any(variant.name.startswith("CFG") for variant in variants(run_of().model, Counter([VIDEO]), H100))


def test_proposed_overrides_are_accepted_by_a_config():
    """P6: a command with them is not refused."""
    for variant in proposed(run_of("throughput_1gpu", "model.options.attention=sdpa"), [VIDEO])["variants"]:
        config = load_config("throughput_1gpu", [*variant["setup"]["overrides"], *variant["overrides"]])
        run = resolve_run(config, [VIDEO.shape])
        assert run.groups.largest.world_size == variant["ranks"]
        chosen = next(each for each in variants(run_of().model, Counter([VIDEO]), H100) if each.is_exact)
        assert run.model.attention == chosen.model.attention or variant["name"] == "as configured"
        assert ("step cache" in variant["name"]) == (run.model.step_cache is not None)
        assert ("sparse" in variant["name"]) == (run.model.methods.sparse is not None)
        assert ("8-bit" in variant["name"]) == (run.model.methods.quantized is not None)


def test_the_plan_shows_prices_and_the_recommendation(tmp_path):
    """The text has a price for each shape and group size, or GPU seconds without one."""
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"prompt": "a"}\n{"prompt": "b", "height": 544, "width": 960}\n')
    config = load_config("throughput_1gpu")
    plan = make_plan(config, [str(manifest)], H100, 2.5)
    costs = [cost["cost"] for cost in plan["costs"]]
    assert sum(costs) == pytest.approx(plan["recommendation"]["variants"][0]["cost"])
    text = render_plan(plan)
    assert "price at 2.5 for a GPU hour of a sample" in text
    assert f"{costs[0]:,.4f}" in text
    assert "recommended: parallel.gpus_per_group=1 groups.count=7" in text
    assert "GPU seconds of a sample" in render_plan(make_plan(config, [str(manifest)], H100))
