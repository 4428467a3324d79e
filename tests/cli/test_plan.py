"""`hv-batch plan`: what it adds up over a manifest, and what it refuses."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress

import pytest
import yaml

from hv_batch.cli.demo import shipped, with_model_base
from hv_batch.cli.plan import render_plan
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.run_config import load_config
from hv_batch.job.cost_model.estimate import make_plan
from hv_batch.job.cost_model.memory import GIB, denoiser_footprint
from hv_batch.job.cost_model.memory_check import memory_problems
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.scheduling.pool_sizing import HEADROOM
from hv_batch.job.workload import count_tokens
from hv_batch.protocol import UserError
from hv_batch.runtime.render import render
from hv_batch.toy.checkpoint import TOY_VAE, write_toy_checkpoint
from tests.support.cli_calls import run_main

RELEASED = ModelShape()
IN_GROUP = {"placement": "group"}


@pytest.fixture
def manifest(tmp_path):
    rows = [
        {"prompt": "a", "num_videos": 3},
        {"prompt": "b", "height": 544, "width": 960, "num_inference_steps": 30},
        {"prompt": "c", "height": 544, "width": 960, "num_inference_steps": 30},
        {"prompt": "d", "height": 544, "width": 960, "num_inference_steps": 30, "cfg_scale": 3.0},
        {"prompt": "e", "num_frames": 1},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def config():
    return load_config(str(shipped("720p_8gpu.yaml")))


def test_a_plan_counts_samples_by_what_they_cost(config, manifest):
    """Samples with the same shape, steps and guidance are one line; guidance doubles the operations."""
    plan = make_plan(config, manifest, GPUS["h100"])
    assert plan["manifest"]["samples"] == 7
    counted = [(w["height"], w["num_frames"], w["steps"], w["cfg"], w["samples"], w["tokens"]) for w in plan["work"]]
    assert counted == [
        (544, 129, 30, False, 2, 67_320),
        (544, 129, 30, True, 1, 67_320),
        (720, 1, 50, False, 1, 3_600),
        (720, 129, 50, False, 3, 118_800),
    ]
    plain, guided, _, hd = (work["denoise_flops"] for work in plan["work"])
    assert guided == 2 * plain
    assert hd == pytest.approx(50 * 12e15, rel=0.01)


def test_a_plan_adds_up(config, manifest):
    """GPUs are those that are reserved, hours those of the slowest stage, and the plan round-trips through JSON."""
    plan = make_plan(config, manifest, GPUS["h100"])
    assert plan == json.loads(json.dumps(plan))
    assert plan["gpus"] == {"groups": 8, "encoders": 1, "decoders": 1, "total": 10}
    estimate = plan["estimate"]["h100"]
    assert estimate["slowest"] == "denoise"
    assert estimate["hours"] == max(estimate["stage_hours"].values())
    assert estimate["gpu_hours"] == pytest.approx(10 * estimate["hours"])
    eight = plan["group_sizes"][-1]
    assert (eight["ranks"], eight["ulysses_degree"]) == (8, 8)
    assert eight["seconds_a_sample"] * 7 / 3600 == pytest.approx(estimate["stage_hours"]["denoise"])
    assert eight["gpu_hours"] == pytest.approx(8 * estimate["stage_hours"]["denoise"])
    videos = [size["videos_a_node_a_day"] for size in plan["group_sizes"]]
    assert videos == sorted(videos, reverse=True), "small groups give throughput"
    (rank,) = [stage for stage in plan["memory"] if stage["stage"] == "denoise rank"]
    assert rank["shape"] == [720, 1280, 129]
    assert rank["total"] == denoiser_footprint(RELEASED, count_tokens((720, 1280, 129)), 8, 1).total


def test_a_plan_sizes_auto_pools_as_a_run_would(config, manifest):
    """With `count: auto`, GPUs and hours are those of the pools that the predicted durations require."""
    groups = config.groups.model_copy(update={"count": 40})
    pools = {name: getattr(config, name).model_copy(update={"count": "auto"}) for name in ("encoders", "decoders")}
    plan = make_plan(config.model_copy(update={"groups": groups, **pools}), manifest, GPUS["h100"])
    fixed = make_plan(config.model_copy(update={"groups": groups}), manifest, GPUS["h100"])
    hours = fixed["estimate"]["h100"]["stage_hours"]
    decoders = math.ceil(HEADROOM * hours["decode"] / hours["denoise"])
    assert decoders > 1
    assert plan["workers"] == {"encode": 1, "denoise": 40, "decode": decoders}
    assert plan["gpus"] == {"groups": 320, "encoders": 1, "decoders": decoders, "total": 321 + decoders}
    assert plan["estimate"]["h100"]["stage_hours"]["decode"] == pytest.approx(hours["decode"] / decoders)
    assert f"{decoders} for {decoders} decoder(s)" in render_plan(plan)


def test_groups_that_decode_add_up_their_hours(config, manifest):
    """decoders.placement: group: no GPUs for decoders, the VAE besides the DiT, and no denoise during a decode."""
    plan = make_plan(config, manifest, GPUS["h100"])
    inside = make_plan(
        config.model_copy(update={"decoders": config.decoders.model_copy(update=IN_GROUP)}),
        manifest,
        GPUS["h100"],
    )
    assert inside["gpus"] == {"groups": 8, "encoders": 1, "decoders": 0, "total": 9}
    hours, apart = (each["estimate"]["h100"]["stage_hours"] for each in (inside, plan))
    assert inside["estimate"]["h100"]["hours"] == hours["denoise"] + hours["decode"]
    assert hours["denoise"] == apart["denoise"]
    assert apart["decode"] / 8 <= hours["decode"] < apart["decode"] / 4, "the last round of tiles is not full"
    assert [stage["stage"] for stage in inside["memory"]] == ["text encoder", "group rank"]
    rank, before = inside["memory"][1], plan["memory"][1]
    assert rank["weights"] == before["weights"] + RELEASED.vae_bytes
    assert rank["activations"] == max(before["activations"], plan["memory"][2]["activations"])
    assert "the hours of both are added" in render_plan(inside)


def test_a_plan_counts_cfg_degree_2(config, tmp_path):
    """P6: with cfg_degree 2, a rank runs one forward per step; a row without guidance is refused by its number."""
    manifest = tmp_path / "guided.jsonl"
    manifest.write_text('{"prompt": "a", "cfg_scale": 3.0}\n')
    shared = config.parallel.model_copy(update={"cfg_degree": 2})
    whole, halves = (
        make_plan(config.model_copy(update={"parallel": parallel}), str(manifest), GPUS["h100"])
        for parallel in (config.parallel.model_copy(update={"gpus_per_group": 4}), shared)
    )
    assert (halves["gpus"]["groups"], whole["gpus"]["groups"]) == (8, 4)
    assert halves["memory"] == whole["memory"]
    assert halves["traffic"]["ulysses_bytes_a_step"] == whole["traffic"]["ulysses_bytes_a_step"] / 2
    assert (halves["traffic"]["exchange_bytes_a_step"], whole["traffic"]["exchange_bytes_a_step"]) == (15_206_400, 0)
    assert halves["traffic"]["group"] == "CFG 2 x Ulysses 4 x ring 1"
    hours = [plan["estimate"]["h100"]["stage_hours"]["denoise"] for plan in (whole, halves)]
    assert hours[0] / hours[1] == pytest.approx(2, rel=0.001)
    assert "CFG 2 x Ulysses 4 x ring 1 keeps 95% of its H100s' speed" in render_plan(halves)
    manifest.write_text('{"prompt": "a", "cfg_scale": 3.0}\n{"prompt": "b"}\n')
    with pytest.raises(
        UserError, match=r"row 2: cfg_scale = 1\.0; allowed: above 1, because with parallel\.cfg_degree"
    ):
        make_plan(config.model_copy(update={"parallel": shared}), str(manifest), GPUS["h100"])


def test_a_plan_lists_the_group_of_each_shape(manifest):
    """With auto: the group of every shape and the reason. Hours count all ranks, GPUs those of the largest group."""
    auto = ["parallel.gpus_per_group=auto", "gpu=H100", "gpu_memory_gib=79.6", "groups.max_sample_minutes=10"]
    config = load_config(str(shipped("720p_8gpu.yaml")), auto)
    plan = make_plan(config, manifest, GPUS["h100"])
    assert plan == json.loads(json.dumps(plan))
    assert [(size["shape"][2], size["samples"], size["ranks"]) for size in plan["sizes"]] == [
        (129, 3, 1),
        (1, 1, 1),
        (129, 3, 4),
    ]
    assert plan["gpus"]["groups"] == 4
    hours = sum(size["gpu_hours"] for size in plan["sizes"])
    assert plan["estimate"]["h100"]["stage_hours"]["denoise"] == pytest.approx(hours / 4)
    assert plan["halves"] is None, "not every row has guidance"
    text = render_plan(plan)
    assert "4 (Ulysses 4 x ring 1), smaller groups take longer than 10 min" in text
    assert "1 (Ulysses 1 x ring 1), the cheapest" in text


def test_a_plan_reports_what_a_faster_kernel_would_save(manifest):
    """cuDNN's kernel saves a third of the GPU hours on GPUs where it is known to be faster and can run."""

    def saving(gpu: str, *overrides: str) -> tuple[float, str]:
        plan = make_plan(load_config(str(shipped("720p_8gpu.yaml")), overrides), manifest, GPUS[gpu])
        return plan["cudnn_would_save"], render_plan(plan).splitlines()[-1]

    share, line = saving("h100", "model.options.attention=sdpa")
    assert 0.2 < share < 0.35
    assert line.startswith(f"model.options.attention=cudnn would denoise this in {share:.0%} less time on H100")
    for gpu, overrides in (
        ("h100", ()),
        ("a100", ("model.options.attention=sdpa",)),
        ("h100", ("model.options.attention=sdpa", "model.options.precision=fp32")),
    ):
        share, line = saving(gpu, *overrides)
        assert share == 0, (gpu, overrides)
        assert "cudnn" not in line


def test_a_plan_shows_the_kernel_that_it_assumes(manifest):
    """`attention: auto` counts as the fastest kernel of the GPU that needs no package. A named kernel is as named."""

    def planned(gpu: str, kernel: str) -> tuple[str, float, str]:
        config = load_config(str(shipped("720p_8gpu.yaml")), [f"model.options.attention={kernel}"])
        plan = make_plan(config, manifest, GPUS[gpu])
        assert plan["attention"]["option"] == kernel
        return plan["attention"]["assumed"], plan["estimate"][gpu]["stage_hours"]["denoise"], render_plan(plan)

    hopper, hours, text = planned("h100", "auto")
    assert hopper == "cudnn"
    assert "attention kernel: auto, for which this plan assumes cudnn" in text
    assert hours == planned("h100", "cudnn")[1]
    assert planned("h100", "fa3")[1] < hours < planned("h100", "sdpa")[1]
    assert planned("a100", "auto")[0] == "sdpa"
    assert "cudnn would" not in text


def test_a_plan_proposes_cfg_degree_2(config, tmp_path):
    """If every row uses guidance: the GPU hours of cfg_degree 2, if they are fewer."""
    manifest = tmp_path / "guided.jsonl"
    manifest.write_text('{"prompt": "a", "cfg_scale": 3.0}\n')
    plan = make_plan(config, str(manifest), GPUS["h100"])
    assert plan["halves"]["gpu_hours"] < plan["halves"]["instead_of"]
    assert "with parallel.cfg_degree=2" in render_plan(plan)
    single = load_config(str(shipped("throughput_1gpu.yaml")))
    assert make_plan(single, str(manifest), GPUS["h100"])["halves"] is None, "one rank has no halves"


def test_sizes_that_the_chosen_attention_cannot_share_are_refused(config, tmp_path):
    """P6: xfuser's attention would attend to padding. Each shape is refused before anything starts."""
    manifest = tmp_path / "square.jsonl"
    manifest.write_text('{"prompt": "a", "height": 720, "width": 720}\n{"prompt": "b"}\n')
    xfuser = config.model.model_copy(update={"options": {**config.model.options, "sequence_parallel": "xfuser"}})
    with pytest.raises(UserError, match=r"^720x720x129: 66825 image tokens do not divide by 8 ranks"):
        make_plan(config.model_copy(update={"model": xfuser}), str(manifest), GPUS["h100"])


def test_options_of_the_model_are_counted(manifest):
    """Offloading, FP8-less precision and group size change what a rank holds."""

    def rank(*overrides: str) -> float:
        plan = make_plan(load_config(str(shipped("720p_8gpu.yaml")), overrides), manifest, GPUS["h100"])
        return plan["memory"][1]["weights"] / 1e9

    assert rank() == pytest.approx(25.6, abs=0.1)
    assert rank("model.options.precision=fp32", "model.options.attention=sdpa") == pytest.approx(51.3, abs=0.1)
    assert rank("model.options.offload=blocks") == rank("model.options.offload=mapped") == pytest.approx(2.1, abs=0.1)


def test_only_steps_that_run_the_model_are_counted(manifest):
    """A step cache and `cfg_until` count in operations, hours and memory, by the steps of each row."""

    def plan(*overrides: str) -> dict:
        return make_plan(load_config(str(shipped("720p_8gpu.yaml")), overrides), manifest, GPUS["h100"])

    whole, cached = plan(), plan("model.options.step_cache={kind: schedule, computed: 16}")
    assert [work.get("computed_steps") for work in cached["work"]] == [10, 10, 16, 16]
    assert "computed_steps" not in whole["work"][0]
    shares = [
        after["denoise_flops"] / before["denoise_flops"]
        for before, after in zip(*(each["work"] for each in (whole, cached)), strict=True)
    ]
    assert shares == pytest.approx([10 / 30, 10 / 30, 16 / 50, 16 / 50])
    hours = [each["estimate"]["h100"]["stage_hours"]["denoise"] for each in (whole, cached)]
    assert 0.32 < hours[1] / hours[0] < 0.34
    assert cached["memory"][1]["activations"] - whole["memory"][1]["activations"] == 3 * 4 * 16 * 33 * 90 * 160
    assert "16 of 50" in render_plan(cached)
    gated = plan("model.options.step_cache={kind: schedule, computed: 16}", "model.options.cfg_until=0.5")
    assert gated["work"][1]["denoise_flops"] / whole["work"][0]["denoise_flops"] == pytest.approx((10 + 4) / 30)


def test_widths_come_from_the_checkpoint_tree(tmp_path):
    """A plan for another checkpoint uses the widths of its VAE and text towers."""
    base = write_toy_checkpoint(tmp_path)
    model = ModelShape.from_options({"model_base": str(base)})
    assert model.vae.block_out_channels == TOY_VAE["block_out_channels"]
    assert model.llama.hidden_size == 64
    assert model.clip.hidden_size == 32
    beside = base / "hunyuan-video-t2v-720p" / "transformers" / "config.json"
    beside.write_text('{"_class_name": "HYVideoDiT", "hidden_size": 128, "heads_num": 8, "rope_dim_list": [8, 4, 4]}')
    heads = {"heads_num": 4, "rope_dim_list": [16, 8, 8]}
    model = ModelShape.from_options({"model_base": str(base), "dit": heads})
    assert (model.dit.hidden_size, model.dit.heads_num) == (128, 4)
    elsewhere = {"model_base": "nowhere", "dit_weight": str(beside.with_name("weights.pt"))}
    assert ModelShape.from_options(elsewhere).dit.hidden_size == 128
    beside.write_text('{"_class_name": "Another", "hidden_size": 64}')
    assert ModelShape.from_options({"model_base": str(base)}).dit.hidden_size == 3072
    unfit = {"model_base": str(base), "dit": {"hidden_size": 64, "heads_num": 0}}
    assert ModelShape.from_options(unfit).dit == RELEASED.dit, "the engine refuses it, or it is another engine's option"
    (base / "text_encoder" / "config.json").write_text("not json")
    assert ModelShape.from_options({"model_base": str(base)}).llama.hidden_size == 4096


def test_the_text_contains_the_whole_plan(config, manifest):
    """Every table, and the note that speeds are estimates."""
    text = render_plan(make_plan(config, manifest, GPUS["l40s"]))
    for expected in ("7 samples", "118,800", "12,821,012,544", "= 10", "19.2 GB by Ulysses", "(speed assumed)"):
        assert expected in text
    assert "estimates" in text
    offloaded = config.model.model_copy(update={"options": {**config.model.options, "offload": "blocks"}})
    text = render_plan(make_plan(config.model_copy(update={"model": offloaded}), manifest, GPUS["l40s"]))
    assert "24.92 stream from the host" in text


def test_a_worker_that_does_not_fit_the_gpu_is_marked(manifest):
    """720p in fp32 on one L40S needs more memory than there is."""
    in_fp32 = ["parallel.ulysses_degree=1", "model.options.precision=fp32", "model.options.attention=sdpa"]
    config = load_config(str(shipped("throughput_1gpu.yaml")), in_fp32)
    plan = make_plan(config, manifest, GPUS["l40s"])
    assert [stage["fits"] for stage in plan["memory"]] == [True, False, True]
    assert "DOES NOT FIT into the 45 of one L40S" in render_plan(plan)


def test_another_engine_has_no_cost_model(config, manifest):
    """P6: there are no estimates for another model."""
    other = config.model.model_copy(update={"engine": "tests.support.doubles:Double"})
    with pytest.raises(UserError, match=r"costs of the engine tests.support.doubles:Double are not known"):
        make_plan(config.model_copy(update={"model": other}), manifest, GPUS["h100"])


# ---- runs that do not fit into GPU memory


def problems_of(config, shapes):
    return memory_problems(resolve_run(config, shapes))


def test_a_run_that_cannot_fit_is_refused_with_every_reason(manifest):
    """P6: too little GPU memory is reported before a GPU is taken, for each shape and stage with the remedy."""
    config = load_config(str(shipped("throughput_1gpu.yaml")), ["gpu_memory_gib=24"])
    found = problems_of(config, [(720, 1280, 129), (720, 1280, 1)])
    subjects = ("720x1280x1 needs", "720x1280x129 needs", "the text encoders need")
    assert [line.startswith(subject) for line, subject in zip(found, subjects, strict=True)] == [True] * 3
    assert any("offload to blocks" in line for line in found)
    assert any("encoders.gpus" in line for line in found)
    with pytest.raises(UserError, match=r"does not fit into GPU memory:\n  - "):
        make_plan(config, manifest, GPUS["h100"])


def test_a_run_that_cannot_fit_claims_no_output_root(manifest, tmp_path):
    """P6: `hv-batch run` refuses it as the plan does, before Ray starts and before anything is written."""
    base = write_toy_checkpoint(tmp_path)
    shares = ("groups.gpus_per_rank=1", "encoders.gpus=1", "decoders.gpus=1")
    overrides = ["gpu_memory_gib=1", "parallel.device=cuda", *shares]
    config = with_model_base(load_config(str(shipped("demo_cpu.yaml")), overrides), base)
    with pytest.raises(UserError, match="does not fit into GPU memory"):
        render(config, manifest, str(tmp_path / "out"), address=None)
    assert not (tmp_path / "out").exists()


def test_runs_that_fit_and_unknown_memory_are_accepted():
    """Without gpu_memory_gib, on a CPU, or for another engine, there is no memory check."""
    shapes = [(720, 1280, 129)]
    path = str(shipped("720p_8gpu.yaml"))
    assert problems_of(load_config(path), shapes) == []
    assert problems_of(load_config(path, ["gpu_memory_gib=79.6"]), shapes) == []
    assert problems_of(load_config(path, ["gpu_memory_gib=1", "model.engine=a:B"]), shapes) == []
    small = load_config(path, ["gpu_memory_gib=1"])
    assert len(problems_of(small, shapes)) == 3
    inside = problems_of(small.model_copy(update={"decoders": small.decoders.model_copy(update=IN_GROUP)}), shapes)
    assert ["decode" in line for line in inside] == [False, False], "no decoder stands by itself"
    on_cpu = small.model_copy(update={"parallel": small.parallel.model_copy(update={"device": "cpu"})})
    assert problems_of(on_cpu, shapes) == []


def test_the_limit_is_the_computed_peak():
    """A run is refused if and only if the computed peak exceeds gpu_memory_gib."""
    need = denoiser_footprint(RELEASED, 118_800, 8, 1).total / GIB
    for memory, refused in ((need - 0.01, True), (need + 0.01, False)):
        config = load_config(str(shipped("720p_8gpu.yaml")), [f"gpu_memory_gib={memory}"])
        assert bool(problems_of(config, [(720, 1280, 129)])) is refused


def test_the_command_runs_without_weights_or_gpus(tmp_path):
    """`hv-batch plan`: exit code 0 and JSON on stdout; a bad manifest is refused as `run` refuses it."""
    base = write_toy_checkpoint(tmp_path)
    config = with_model_base(load_config(str(shipped("demo_cpu.yaml"))), base)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (tmp_path / "good.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "height": 100}\n')

    def plan(name):
        return run_main(
            *("plan", "--config", tmp_path / "config.yaml", "--manifest", tmp_path / name, "--json", "--gpu", "h20")
        )

    code, stdout, stderr = plan("good.jsonl")
    assert code == 0, stderr
    found = json.loads(stdout)
    assert found["gpu"]["name"] == "H20"
    assert found["work"][0]["tokens"] == 9 * 8 * 8
    code, stdout, stderr = plan("bad.jsonl")
    assert code == 1
    assert "row 1: height = 100" in json.loads(stdout)["error"]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "overrides",
    [
        ["groups.count=1000000000", "encoders.count=999999999"],
        ["parallel.gpus_per_group=9973"],
        ["parallel.ulysses_degree=9973", "parallel.ring_degree=9967", "groups.nodes_per_group=7"],
        ["parallel.gpus_per_group=1000000000000"],
        ["groups.count=1" + "0" * 400],
        ["output.shard_size=1000000000"],
    ],
    ids=str,
)
def test_a_number_in_a_config_does_not_decide_how_long_a_plan_takes(manifest, overrides):
    """P6: divisors and the best number of groups are not found by trying every number."""
    started = time.process_time()
    with suppress(UserError):
        render_plan(make_plan(load_config(str(shipped("720p_8gpu.yaml")), overrides), manifest, GPUS["h100"]))
    assert time.process_time() - started < 20  # hours, if every number is tried
