"""hv_batch.job.config.run_config: the run config is complete, strict, and says every problem at once."""

import json

import fsspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.records.run_identity import run_identity
from hv_batch.protocol import UserError
from hv_batch.sampling_params import problems
from tests.support.repository import CONFIGS


def identity_of(config):
    return run_identity(resolve_run(config))


@pytest.fixture
def write(tmp_path):
    def write_config(text=""):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_config


def refusal(url, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(url, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_say_when_to_use_them(path):
    """Each shipped config begins with a comment that says when to use it."""
    load_config(str(path))
    assert path.read_text(encoding="utf-8").startswith("# Use it ")


def test_shipped_configs_reserve_what_their_comments_say():
    """The demo needs two CPUs, 720p_8gpu 10 GPUs, throughput_1gpu and fake_gpus_8rank 8."""

    def bill(name):
        config = load_config(str(CONFIGS / name))
        ranks = config.groups.count * resolve_run(config, [(720, 1280, 129)]).groups.largest.world_size
        gpus = ranks * config.groups.gpus_per_rank
        gpus += config.encoders.count * config.encoders.gpus + config.decoders.count * config.decoders.gpus
        cpus = ranks * config.groups.cpus_per_rank
        cpus += config.encoders.count * config.encoders.cpus + config.decoders.count * config.decoders.cpus
        return gpus, cpus

    assert bill("demo_cpu.yaml") == (0, 2)
    assert bill("720p_8gpu.yaml")[0] == 10
    assert bill("mixed_shapes.yaml")[0] == 8
    assert bill("throughput_1gpu.yaml")[0] == 8
    assert bill("fake_gpus_8rank.yaml") == (8, 1)


def test_an_empty_config_has_the_release_defaults(write):
    """The released defaults: 720x1280, 129 frames, 50 steps, guidance 6, shift 7, CFG off."""
    config = load_config(write())
    assert config == RunConfig()
    defaults = config.defaults.model_dump()
    assert (defaults["height"], defaults["width"], defaults["num_frames"]) == (720, 1280, 129)
    assert (defaults["num_inference_steps"], defaults["guidance_scale"], defaults["flow_shift"]) == (50, 6.0, 7.0)
    assert (defaults["cfg_scale"], defaults["guidance_rescale"], defaults["fps"]) == (1.0, 0.0, 24)
    assert defaults["negative_prompt"].startswith("Aerial view, aerial view, overexposed")
    assert problems(defaults) == []


def test_all_problems_are_reported_at_once(write):
    """P6: bad values, unknown keys, rules across keys and invalid overrides are in one error."""
    text = refusal(
        write(
            "seed: -1\n"
            "defaults: {hieght: 3, height: 721, num_frames: 34, fps: true, cfg_scale: .nan}\n"
            "groups: {count: 0, gpus_per_rank: '1'}\n"
            "parallel: {device: gpu}\n"
            "media: {preset: warp}\n"
            "encoders: 5\n"
            "height: 720\n"
            "qwertz: 1\n"
        ),
        "nothing",
        "groups.cout=3",
        "model.engine=hunyuan",
    )
    for expected in (
        "seed = -1; allowed: a whole number from 0 to 2^63 - 1",
        "defaults.hieght: unknown key. Did you mean defaults.height?",
        "defaults.height = 721; allowed: a multiple of 16 from 16 to 8192; nearest: 720 and 736",
        "defaults.num_frames = 34; allowed: 4n + 1",
        "defaults.fps = true; allowed: a whole number from 1 to 240",
        "defaults.cfg_scale = NaN; allowed: a number from 1",
        "groups.count = 0; allowed: greater than or equal to 1",
        'groups.gpus_per_rank = "1"; allowed: a valid number',
        "parallel.device = \"gpu\"; allowed: 'cpu' or 'cuda'",
        'media.preset = "warp"; allowed: ',
        "encoders = 5; allowed: a mapping of the keys count, gpus, cpus, batch_size",
        "height: unknown key. Did you mean defaults.height?",
        "qwertz: unknown key. Known keys here: seed, ",
        'override "nothing"; allowed: key=value',
        "groups.cout: unknown key. Did you mean groups.count?",
        'model.engine = "hunyuan"; allowed: an import path, package.module:Name',
    ):
        assert expected in text
    assert "has 16 problem(s)" in text


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("groups.gpus_per_rank=0", "allowed: 1"),
        ("groups.gpus_per_rank=0.5", "allowed: 1"),
        ("groups.gpus_per_rank=2", "less than or equal to 1"),
        ("media.threads=0", "greater than or equal to 1"),
        ("media.crf=60", "media.crf = 60 with media.codec = h264; allowed: at most 51"),
        ("decoders.count=0", "decoders.count = 0; allowed: a whole number from 1 to 1000000000, or auto"),
        ("encoders.count=automatic", "a whole number from 1 to 1000000000, or auto"),
        ("encoders.count=1.5", "a whole number from 1 to 1000000000, or auto"),
        ("groups.count=auto", "a valid integer"),
        ("timeouts.drain_s=0", "greater than 0"),
        ("timeouts.drain_s=.inf", "finite"),
        ("defaults.num_videos=0", "a whole number from 1 to 10000"),
        ("defaults.guidance_scale=1" + 400 * "0", "a number from 0 to 100"),
        ("decoders={count: 1, count: 2}", "given twice"),
        ("model.engine.name=x", "a valid string"),
        ("=3", "key=value"),
        ("a..b=3", "key=value"),
        ("media.crf=[", "not valid YAML"),
    ],
)
def test_invalid_values_are_refused(write, override, allowed):
    """P6: each error names what is allowed."""
    assert allowed in refusal(write(), override)


def test_one_rank_may_share_a_gpu(write):
    """A group of one rank may reserve a fraction: NCCL is not involved."""
    config = load_config(write(), ["parallel.ulysses_degree=1", "groups.gpus_per_rank=0.5"])
    assert config.groups.gpus_per_rank == 0.5


def test_overrides_are_yaml_values_laid_over_the_file(write):
    """key=value of the command line overrides the file, also inside model.options."""
    url = write("groups: &same {count: 2}\nencoders: *same\nmodel: {options: {dit: {depth: 1}}}\n")
    config = load_config(
        url,
        [
            "groups.count=4",
            "output.keep_latents=true",
            "defaults.flow_shift=1e1",
            "defaults.guidance_scale=5",
            "parallel={device: cpu, ring_degree: 2}",
            "model.options.dit.width=0x10",
            "model.options.tile.px=null",
            "model.options.name='1'",
            "defaults.negative_prompt=",
        ],
    )
    assert (config.groups.count, config.encoders.count) == (4, 2)  # an alias is not a shared variable
    assert config.output.keep_latents is True
    assert (config.defaults.flow_shift, config.defaults.guidance_scale) == (10.0, 5.0)
    assert (config.parallel.device, resolve_run(config).fixed_plan.world_size) == ("cpu", 16)
    assert config.model.options == {"dit": {"depth": 1, "width": 16}, "tile": {"px": None}, "name": "1"}
    assert config.defaults.negative_prompt == ""


@settings(deadline=None)  # a busy machine is not a failure
@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["Cc"])))
def test_an_unquoted_text_is_one_scalar(tmp_path_factory, text):
    """A prompt on the command line may contain ': ', ' #', braces and quotes."""
    path = tmp_path_factory.getbasetemp() / "empty.yaml"
    path.touch()
    config = load_config(str(path), [f"defaults.negative_prompt=an {text}"])
    assert config.defaults.negative_prompt == f"an {text}".strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' is given twice"),
        ("groups: {count: 1\n", "not valid YAML"),
        ("- seed\n", "allowed: a mapping of the keys seed, "),
        ("just words\n", "allowed: a mapping of the keys"),
        ("seed: !!python/object:os.system {}\n", "not valid YAML"),
        ("seed: 2024-13-45\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_config(write, text, expected):
    """P6: an invalid file is refused with the position, and YAML tags run no code."""
    assert expected in refusal(write(text))


def test_a_file_that_is_not_text(tmp_path):
    """P6: bytes that are not UTF-8 are a user error, not a traceback."""
    (tmp_path / "config.yaml").write_bytes(b"seed: \xff\xfe\n")
    assert "not valid YAML" in refusal(str(tmp_path / "config.yaml"))


def test_configs_come_from_any_url(tmp_path):
    """A config may be at any fsspec URL; the error for a missing file names it."""
    fsspec.filesystem("memory").pipe("/configs/night.yaml", b"seed: 7\n")
    assert load_config("memory://configs/night.yaml").seed == 7
    assert "does not exist" in refusal("memory://configs/day.yaml")
    assert "does not exist" in refusal(str(tmp_path / "none.yaml"))
    assert "is a directory" in refusal(str(tmp_path))
    assert "cannot be opened" in refusal("nosuchscheme://x.yaml")


def test_identity_is_what_changes_pixels_and_keys():
    """P3: seed, engine, defaults, parallel, media and shard size; everything else may change between resumes."""
    plain = RunConfig()
    changing = {
        "seed": 1,
        "model": {"engine": "my.engine:Engine"},
        "defaults": {"fps": 25},
        "parallel": {"ring_degree": 2},
        "media": {"crf": 20},
        "output": {"shard_size": 4},
    }
    for section, values in changing.items():
        assert identity_of(RunConfig.model_validate({section: values})) != identity_of(plain), section
    free = {
        "groups": {"count": 9},
        "timeouts": {"stall_s": 5},
        "encoders": {"batch_size": 1},
        "decoders": {"cpus": 1},
        "retries": {"poison": 1},
        "media": {"poster": False},
        "output": {"keep_latents": True},
        "model": {"options": {"model_base": "elsewhere"}},
    }
    assert identity_of(RunConfig.model_validate(free)) == identity_of(plain)
    sections = {"seed", "engine", "defaults", "parallel", "media", "shard_size", "webdataset"}
    assert set(identity_of(plain)) == {"revision", *sections}
    assert json.loads(json.dumps(identity_of(plain))) == identity_of(plain)


def test_a_new_key_is_in_the_identity_only_if_it_is_used():
    """P2: output roots of versions without cfg_degree can be resumed; P3: not with another cfg_degree."""
    assert "cfg_degree" not in identity_of(RunConfig.model_validate({"parallel": {"cfg_degree": 1}}))["parallel"]
    halves = RunConfig.model_validate({"parallel": {"cfg_degree": 2}})
    assert identity_of(halves)["parallel"]["cfg_degree"] == 2
    assert resolve_run(halves).fixed_plan.world_size == 2 * resolve_run(RunConfig()).fixed_plan.world_size
    for wrong in (0, 3, True, 1.0):
        with pytest.raises(ValueError, match="cfg_degree"):
            RunConfig.model_validate({"parallel": {"cfg_degree": wrong}})


def test_equal_settings_have_equal_identities():
    """P2: 6 and 6.0 are one guidance scale, or a resume with a reformatted config would be refused."""
    whole = RunConfig.model_validate({"defaults": {"guidance_scale": 6}})
    assert json.dumps(identity_of(whole)) == json.dumps(identity_of(RunConfig()))


def test_only_the_ring_crosses_nodes(write):
    """groups.nodes_per_group: a plan whose Ulysses part would cross nodes is refused, with the allowed plans."""
    overrides = ["groups.nodes_per_group=2", "parallel.ulysses_degree=4", "parallel.ring_degree=1"]
    text = refusal(write(""), *overrides)
    assert "groups.nodes_per_group = 2" in text
    assert "may be 1 x 4, 2 x 2" in text
    text = refusal(write(""), "groups.nodes_per_group=3", *overrides[1:])
    assert "a number of ranks that 3 divides" in text
    config = load_config(write(""), [*overrides[:2], "parallel.ring_degree=2"])
    assert identity_of(config) == identity_of(load_config(write(""), [overrides[1], "parallel.ring_degree=2"]))


def test_a_stopped_job_has_time_to_drain():
    """`ray job stop` waits longer than a drain takes, so the run ends by itself."""
    wait_s = float(
        yaml.safe_load((CONFIGS.parent / "jobs" / "runtime_env.yaml").read_text())["env_vars"][
            "RAY_JOB_STOP_WAIT_TIME_S"
        ]
    )
    assert wait_s > RunConfig().timeouts.drain_s
