"""`hv-batch sample` on the toy checkpoint: the released flags, the files, and the error messages."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from hv_batch.cli.sample import command as sample
from hv_batch.cli.sample import files as sample_files
from hv_batch.cli.sample.flags import FIXED, ignored_flags, parse, round_up
from hv_batch.engine.determinism import make_deterministic
from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.protocol import UserError
from hv_batch.sampling_params import DEFAULT_NEGATIVE_PROMPT
from hv_batch.toy.checkpoint import write_toy_checkpoint
from tests.support.repository import ROOT

PROMPT = "A cat walks on the grass, realistic style."
FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
IN_FP32 = [f"--{flag}=fp32" for flag in ("precision", "vae-precision", "text-encoder-precision")]
IN_FP32.append("--text-encoder-precision-2=fp32")
SMALL = ["--video-size", "32", "48", "--video-length", "5", "--infer-steps", "2", "--device", "cpu", *IN_FP32]

# The commands in the README of the release, from the first flag on.
RELEASED_COMMANDS = [
    '--video-size 720 1280 --video-length 129 --infer-steps 50 --prompt "P" --flow-reverse --use-cpu-offload '
    "--save-path ./results",
    '--video-size 1280 720 --video-length 129 --infer-steps 50 --prompt "P" --flow-reverse --seed 42 '
    "--ulysses-degree 8 --ring-degree 1 --save-path ./results",
    '--dit-weight fp8.pt --video-size 1280 720 --video-length 129 --infer-steps 50 --prompt "P" --seed 42 '
    "--embedded-cfg-scale 6.0 --flow-shift 7.0 --flow-reverse --use-cpu-offload --use-fp8 --save-path ./results",
]

# Every flag of the released parser except --prompt, with its released default.
RELEASED_DEFAULTS = {
    "model": "HYVideo-T/2-cfgdistill",
    "latent_channels": 16,
    "precision": "bf16",
    "rope_theta": 256,
    "vae": "884-16c-hy",
    "vae_precision": "fp16",
    "vae_tiling": True,
    "text_encoder": "llm",
    "text_encoder_precision": "fp16",
    "text_states_dim": 4096,
    "text_len": 256,
    "tokenizer": "llm",
    "prompt_template": "dit-llm-encode",
    "prompt_template_video": "dit-llm-encode-video",
    "hidden_state_skip_layer": 2,
    "apply_final_norm": False,
    "text_encoder_2": "clipL",
    "text_encoder_precision_2": "fp16",
    "text_states_dim_2": 768,
    "tokenizer_2": "clipL",
    "text_len_2": 77,
    "denoise_type": "flow",
    "flow_shift": 7.0,
    "flow_solver": "euler",
    "model_base": "ckpts",
    "load_key": "module",
    "use_cpu_offload": False,
    "batch_size": 1,
    "infer_steps": 50,
    "save_path": "./results",
    "save_path_suffix": "",
    "name_suffix": "",
    "num_videos": 1,
    "video_size": (720, 1280),
    "video_length": 129,
    "seed": None,
    "neg_prompt": None,
    "cfg_scale": 1.0,
    "embedded_cfg_scale": 6.0,
    "use_fp8": False,
    "reproduce": False,
    "ulysses_degree": 1,
    "ring_degree": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def pipeline(base):
    return HunyuanVideoPipeline.from_pretrained(base, device="cpu", **FP32)


@pytest.fixture
def render(base, tmp_path, capsys, caplog):
    """Run the command; returns the files that it printed and its log messages, one per line."""
    caplog.set_level(logging.INFO, "hv_batch")

    def run(*flags, small=SMALL):
        where = ["--model-base", str(base), "--save-path", str(tmp_path / "out")]
        assert sample.main([*small, *where, *map(str, flags)]) == 0
        return [Path(line) for line in capsys.readouterr().out.splitlines()], "\n".join(caplog.messages)

    return run


def record_of(file):
    return json.loads(file.with_name(file.stem + ".json").read_text())


def digest(frames):
    return hashlib.sha256(frames.tobytes()).hexdigest()


def frames_of(pipeline, **choice):
    small = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
    return pipeline(PROMPT, **{**small, **choice})


def test_a_released_command_renders(base, pipeline, tmp_path):
    """Spec section 1: the flags of a released command work unchanged. The file has the released name, its record the
    parameters, and its frames are those of the Python API. stdout has only the path; log records go to stderr."""
    command = [sys.executable, "-m", "hv_batch", "sample", "--model-base", str(base), *SMALL, "--prompt", PROMPT]
    command += ["--flow-reverse", "--disable-autocast", "--seed", "42", "--save-path", str(tmp_path / "results")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, check=True
    )
    (video,) = map(Path, done.stdout.splitlines())
    assert "WARNING --disable-autocast has no effect" in done.stderr
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d-\d\d:\d\d:\d\d_seed42_{re.escape(PROMPT)}\.mp4", video.name)
    assert sorted(video.parent.iterdir()) == sorted([video, video.with_name(video.stem + ".json")])
    meta = next(imageio_ffmpeg.read_frames(str(video)))
    assert (meta["size"], meta["fps"]) == ((48, 32), 24.0)
    record = record_of(video)
    assert record["frames_sha256"] == digest(frames_of(pipeline, seed=42))
    assert record["params"]["prompt"] == PROMPT
    assert record["engine"] == pipeline.engine.identity()
    assert record["text"] == {"num_tokens": 10, "tokens_lost": 0}


@pytest.mark.parametrize("command", RELEASED_COMMANDS)
def test_the_released_commands_are_parsed(command):
    """Spec section 1: the flags in the README of the release are accepted."""
    options = parse(command.replace('"', "").split())
    assert options.prompt == ["P"]
    assert options.flow_reverse
    assert sorted(options.video_size) == [720, 1280]


def test_every_released_flag_has_its_released_default():
    """Spec section 1. Exceptions: `--dit-weight` is relative to `--model-base`, and `--flow-reverse` is on."""
    options = vars(parse(["--prompt", "P"]))
    assert {name: options[name] for name in RELEASED_DEFAULTS} == RELEASED_DEFAULTS
    everything = []
    for name, value in RELEASED_DEFAULTS.items():
        flag = "--" + name.replace("_", "-")
        if name == "apply_final_norm":
            continue
        if isinstance(value, bool):
            everything.append(flag)
        elif value not in (None, ""):
            everything += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    ignored = ["--seed-type", "auto", "--model-resolution", "540p", "--disable-autocast", "--linear-schedule-end", "25"]
    ignored.append("--use-linear-quadratic-schedule")
    options = parse([*everything, *ignored, "--prompt", "P"])
    assert options.use_fp8
    assert options.reproduce
    assert set(ignored_flags(options)) == {flag for flag in ignored if flag.startswith("--")}
    assert ignored_flags(parse(["--prompt", "P"])) == []


@pytest.mark.parametrize("flag", FIXED)
def test_a_part_that_was_not_released_is_refused(flag):
    """P6: a flag that would change pixels is never silently ignored."""
    value, reason = FIXED[flag]
    other = value + 1 if isinstance(value, int) else "other"
    with pytest.raises(UserError, match=re.escape(reason)):
        parse([flag, str(other), "--prompt", "P"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--video-size", "0"], "--video-size is 0. Height and width must be at least 1"),
        (["--video-size", "-720", "1280"], "--video-size is -720 1280"),
        (["--video-size", "1", "2", "3"], "Give one number for both sides, or height and width"),
        (["--video-size", "99999"], "height of --video-size is 100000, allowed is a multiple of 16"),
        (["--video-size", "big"], "argument --video-size: invalid int value: 'big'"),
        (["--video-length", "128"], "--video-length is 128, allowed is 4n + 1"),
        (["--video-length", "0"], "--video-length is 0"),
        (["--infer-steps", "0"], "--infer-steps is 0"),
        (["--seed", "-1"], "--seed is -1, allowed is a whole number from 0"),
        (["--seed", str(2**63 - 1), "--num-videos", "2"], f"seed is {2**63}"),
        (["--seed", "x"], "--seed: invalid int value"),
        (["--prompt", "  "], "--prompt is '', allowed is a text that is not blank"),
        (["--prompt", "caf\udce9"], "prompt is not valid Unicode text"),
        (["--num-videos", "0"], "--num-videos is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--ulysses-degree", "0"], "--ulysses-degree is 0"),
        (["--cfg-degree", "2"], "--cfg-degree is 2 with --cfg-scale 1.0: half of the ranks would compute nothing"),
        (["--cfg-degree", "3"], "argument --cfg-degree: invalid choice: 3"),
        (["--attention", "cudnn"], "attention: cudnn computes in half precision only, and precision is fp32"),
        (["--attention", "cudnn", "--precision", "bf16"], "attention 'cudnn' needs cuDNN, a CUDA device and half"),
        (["--ulysses-degree", "3"], "ulysses_degree 3 does not divide the model's 8 attention heads"),
        (["--cfg-scale", "nan"], "--cfg-scale is nan, allowed is a number from 1 (off) to 100"),
        (["--embedded-cfg-scale", "-1"], "--embedded-cfg-scale is -1.0"),
        (["--flow-shift", "nan"], "--flow-shift is nan"),
        (["--guidance-rescale", "2"], "--guidance-rescale is 2.0"),
        (["--precision", "int8"], "argument --precision: invalid choice: 'int8'"),
        (["--apply-final-norm"], "the model was trained without it"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--model-base", "nowhere"], "nowhere is not a folder | The layout is"),
        (["--use-fp8"], "contains no FP8 weights"),
        (["--attention", "flash", "--precision", "bf16"], "attention 'flash' needs the flash-attn package"),
        (["--from-latents", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ],
)
def test_bad_input_is_reported_in_one_line(base, tmp_path, flags, message):
    """P6: the message has the flag, its value and the allowed values, before a model is loaded."""
    known = [] if "--prompt" in flags else ["--prompt", PROMPT]
    where = ["--model-base", str(base), "--save-path", str(tmp_path)]
    with pytest.raises(UserError) as refusal:
        sample.main([*SMALL, *where, *known, *flags])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_weights_that_overflow_are_reported_in_one_line(base, tmp_path):
    """P6: the error is one paragraph with the remedy."""
    transformers = base / "hunyuan-video-t2v-720p" / "transformers"
    shutil.copytree(transformers, tmp_path / "nan")
    (file,) = (tmp_path / "nan").glob("*.pt")
    content = torch.load(file, weights_only=True)
    content["module"]["final_layer.linear.bias"].fill_(torch.nan)
    torch.save(content, file)
    flags = ["--model-base", str(base), "--dit-weight", str(file), "--save-path", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"latents are not finite after step 1 of 2.*wider --precision"):
        sample.main([*SMALL, *flags, "--prompt", PROMPT])


def test_a_missing_prompt_and_a_launcher_are_refused(monkeypatch):
    """P6: under torchrun, every rank would start all ranks again."""
    with pytest.raises(UserError, match="--prompt is missing"):
        parse([])
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"started it 8 times\. Run it once, without torchrun"):
        sample.main(["--prompt", PROMPT])


def test_the_save_path_is_probed_before_the_render(base, monkeypatch):
    """P6: a folder that takes no files is reported before the weights are loaded. /proc takes none, even from root."""
    monkeypatch.setattr(sample, "_render", lambda *_: pytest.fail("rendered first"))
    for path, message in (("/proc", "--save-path /proc cannot be written"), (" ", "--save-path is blank")):
        with pytest.raises(UserError, match=message):
            sample.main([*SMALL, "--model-base", str(base), "--prompt", PROMPT, "--save-path", path])


def test_an_unusable_save_path_is_refused(base, tmp_path):
    """P6: it is found before the model is loaded."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be created"):
        sample.main([*SMALL, "--model-base", str(base), "--prompt", PROMPT, "--save-path", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("given", "rounded"), [((720, 1280), (720, 1280)), ((545, 961), (560, 976)), ((100,), (112, 112)), ((1,), (16, 16))]
)
def test_sizes_are_rounded_up(given, rounded):
    """Spec section 1: each side is rounded up to a multiple of 16; one value means both sides."""
    assert round_up(given) == rounded


def test_an_image_of_a_rounded_size(render, pipeline):
    """Spec section 1: one frame is a PNG; the rounding is logged."""
    (image,), messages = render("--prompt", PROMPT, "--seed", 7, "--video-length", 1, "--video-size", 30, 40)
    assert image.suffix == ".png"
    assert "size 30x40 is rounded up to multiples of 16: 32x48" in messages
    assert record_of(image)["frames_sha256"] == digest(frames_of(pipeline, seed=7, num_frames=1))


def test_several_videos_and_a_batch(render, pipeline):
    """Spec section 1: video i has seed + i, the batch does not change pixels, and all prompts have the same seeds."""
    videos, _ = render("--prompt", PROMPT, "--prompt", "dark", "--seed", 5, "--num-videos", 2, "--batch-size", 3)
    records = [record_of(video) for video in videos]
    assert [(r["params"]["prompt"], r["params"]["seed"]) for r in records] == [
        (prompt, seed) for prompt in (PROMPT, "dark") for seed in (5, 6)
    ]
    assert [r["frames_sha256"] for r in records[:2]] == [digest(frames_of(pipeline, seed=seed)) for seed in (5, 6)]
    assert len({r["frames_sha256"] for r in records}) == 4


def test_latents_can_be_decoded_later(render, pipeline):
    """`--latents-only`, then `--from-latents`: pixels and record are those of a direct render."""
    flags = ("--prompt", PROMPT, "--seed", 9, "--cfg-scale", 3, "--guidance-rescale", 0.5)
    (latents,), _ = render(*flags, "--latents-only")
    with safe_open(latents, framework="np") as file:
        assert file.get_tensor("latents").shape == (16, 2, 4, 6)
        assert json.loads(file.metadata()["record"])["params"]["cfg_scale"] == 3.0
    (video,), _ = render("--from-latents", latents, "--name-suffix", "later")
    assert video.name.endswith(f"_seed9_{PROMPT}_later.mp4")
    record = record_of(video)
    expected = frames_of(pipeline, seed=9, cfg_scale=3.0, guidance_rescale=0.5)
    assert record["frames_sha256"] == digest(expected)
    assert record["params"]["negative_prompt"] == DEFAULT_NEGATIVE_PROMPT  # none was given
    assert record["engine"] == pipeline.engine.identity()
    (other,), _ = render("--from-latents", latents, "--vae-precision", "bf16")
    assert record_of(other)["engine"] == {**record["engine"], "vae_precision": "bf16"}
    assert record_of(other)["frames_sha256"] != digest(expected)


def test_invalid_latents_are_refused(base, tmp_path):
    """P6: the file has no latents, or latents of another model."""
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"latents": np.zeros((4, 2, 4, 6), np.float32)}, tmp_path / "four.safetensors")
    save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    latents = np.zeros((16, 2, 4, 6), np.float32)
    save_file({"latents": latents}, tmp_path / "deep.safetensors", metadata={"record": "[" * 5000})
    save_torch({"latents": torch.zeros(16, 2, 4, 6, dtype=torch.bfloat16)}, tmp_path / "bf16.safetensors")
    save_file({"latents": latents.astype(np.int64)}, tmp_path / "int.safetensors")
    refusals = {
        "text": "is not a .safetensors file",
        "four": r"\[4, 2, 4, 6\]",
        "other": "latents",
        "deep": "nested deeper",
        "bf16": "they are BF16; allowed: F16, F32, F64",
        "int": "they are I64",
    }
    for name, message in refusals.items():
        with pytest.raises(UserError, match=message):
            sample.main(["--model-base", str(base), "--from-latents", str(tmp_path / f"{name}.safetensors")])


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(render):
    """Spec 3.1: the image is rendered with 315 tokens; the number of ignored tokens is logged and recorded."""
    (image,), messages = render("--prompt", "cat " * 360, "--seed", 1, "--video-length", 1, "--infer-steps", 1)
    assert "has 360 tokens, but the model reads 315: the last 45 are ignored" in messages
    assert record_of(image)["text"] == {"num_tokens": 315, "tokens_lost": 45}
    assert len(image.name.encode()) <= 255


def test_a_random_seed_is_logged(render):
    """Spec section 1: without --seed the seed is random, and the user must be able to use it again."""
    (image,), messages = render("--prompt", "{} <|eot_id|>", "--video-length", 1, "--infer-steps", 1)
    (seed,) = re.findall(r"^seed (\d+)$", messages, re.MULTILINE)
    assert f"_seed{seed}_{{}} <|eot_id|>.png" in image.name


def test_folder_and_names_take_their_suffixes(render, tmp_path):
    """Spec section 1: `--save-path-suffix` is appended to the name of the folder."""
    (image,), _ = render("--prompt", "x", "--video-length", 1, "--infer-steps", 1, "--save-path-suffix", "b")
    assert image.parent == tmp_path / "out_b"


hostile = st.text(max_size=300) | st.text("/.\n\0\u202e🎈é<>|", max_size=300)


@settings(max_examples=50, deadline=None)
@example(prompt="🎈" * 100, suffix="")
@example(prompt="🎈" * 100, suffix="🎈" * 300)
@given(prompt=hostile.filter(lambda text: not re.search("[\ud800-\udfff]", text)), suffix=hostile)
def test_names_are_safe_for_any_prompt(tmp_path_factory, prompt, suffix):
    """File names stay in the folder, have only printable characters, and are short enough for the file system."""
    folder = tmp_path_factory.mktemp("names")
    suffix = re.sub("[\ud800-\udfff]", "", suffix)
    stem = sample_files.free_stem(folder, f"seed1_{sample_files.shorten(prompt)}", suffix)
    path = stem.with_name(stem.name + ".safetensors")
    path.touch()
    assert path.parent == folder
    assert path.name.isprintable()
    again = sample_files.free_stem(folder, f"seed1_{sample_files.shorten(prompt)}", suffix)
    assert again != stem
    assert len(again.with_name(again.name + ".safetensors").name.encode()) <= 255


@pytest.fixture
def nondeterministic(monkeypatch):
    """Restore the settings of the process after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.usefixtures("nondeterministic")
def test_reproduce_makes_the_engine_deterministic(render, pipeline):
    """`--reproduce`: every kernel of the engine has a deterministic form, which gives the same bits on the CPU."""
    (video,), _ = render("--prompt", PROMPT, "--seed", 3, "--reproduce")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert record_of(video)["frames_sha256"] == digest(frames_of(pipeline, seed=3))
    make_deterministic(1)
    drawn = torch.rand(1), np.random.rand()
    make_deterministic(1)
    assert drawn == (torch.rand(1), np.random.rand())


def test_options_reach_the_engine(render):
    """Spec section 1: the record has all flags on which the pixels depend."""
    flags = ("--noise", "official", "--no-vae-tiling", "--no-flow-reverse", "--attention", "math")
    (image,), _ = render("--prompt", "x", "--video-length", 1, "--infer-steps", 1, *flags)
    engine = record_of(image)["engine"]
    assert (engine["noise"], engine["flow_reverse"], engine["attention"]) == ("official", False, "math")
    assert engine["vae_tile"]["spatial_px"] == 8192
    assert engine["text_encoder_precision_2"] == "fp32"


@pytest.mark.slow
def test_without_a_gpu_the_duration_is_named_and_progress_is_logged(base, tmp_path):
    """Off a terminal: percent, rate and ETA. A render that takes hours names what to do instead, before it begins."""
    command = [sys.executable, "-m", "hv_batch", "sample", "--model-base", str(base), "--prompt", PROMPT, *SMALL]
    done = subprocess.run(
        [*command, "--seed", "1", "--save-path", str(tmp_path), "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert "no GPU is used: on this CPU, a video of 32x48x5 takes at least" in done.stderr
    assert re.search(r"denoising: 100%, .* s a step, ETA 00:00, step 2/2", done.stderr)
    printed = json.loads(done.stdout)
    assert printed["schema"] == "hv_batch/samples/1"
    assert [Path(file).is_file() for file in printed["files"]] == [True]


def test_a_render_that_takes_hours_is_announced_with_other_ways(caplog):
    options = parse(["--prompt", "x", "--seed", "1", "--precision", "fp32", "--vae-precision", "fp32"])
    with caplog.at_level(logging.WARNING, "hv_batch"):
        sample._log_cpu_time(options, sample._videos(options)[0])
    assert re.search(r"720x1280x129 takes at least [\d,.]+ h ", caplog.text)
    assert "Use a machine with a GPU; or render less" in caplog.text
