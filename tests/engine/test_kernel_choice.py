"""`attention: auto`: the ranks choose one kernel together, the record names it, and a run's choice is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hv_batch.architecture import DiTConfig
from hv_batch.cli.sample.command import main
from hv_batch.cli.sample.files import read_latents
from hv_batch.engine import kernel_choice
from hv_batch.engine.attention.kernels import KERNELS, attend_math
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.kernel_choice import choose_for_group
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.engine.self_check import check_kernel
from hv_batch.protocol import DeviceError, UserError
from hv_batch.toy.checkpoint import write_toy_checkpoint
from tests.support.dit_reference import ALONE, random_dit

FP32 = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
SIZE = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
SMALL = DiTConfig(
    hidden_size=64, heads_num=4, rope_dim_list=(4, 6, 6), mm_double_blocks_depth=1, mm_single_blocks_depth=1
)
CPU = torch.device("cpu")


def wrong(q, k, v):
    out, lse = attend_math(q, k, v)
    return 1.1 * out, lse


def crashing(_q, _k, _v):
    raise RuntimeError("no kernel image is available for execution on the device")


def not_finite(q, k, v):
    out, lse = attend_math(q, k, v)
    return out * float("nan"), lse


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def offer(monkeypatch):
    """Let `auto` try these kernels, in order."""

    def set_candidates(**kernels):
        for name, kernel in kernels.items():
            monkeypatch.setitem(KERNELS, name, kernel)
        monkeypatch.setattr(kernel_choice, "candidates", lambda _major, is_half: tuple(kernels))

    return set_candidates


def test_the_first_kernel_that_passes_the_self_check_is_chosen(offer):
    """A kernel with wrong results, with NaN, or that raises is passed over."""
    offer(wrong=wrong, not_finite=not_finite, crashing=crashing, good=attend_math, math=attend_math)
    model = random_dit(SMALL, seed=1)
    assert choose_for_group(model, SequenceMesh.single(), CPU) == "good"
    assert model.attention == "good"


def test_without_a_good_kernel_the_device_is_the_cause(offer):
    offer(wrong=wrong, crashing=crashing)
    with pytest.raises(DeviceError, match=r"wrong: .*deviates from plain attention.*crashing: .*no kernel image"):
        choose_for_group(random_dit(SMALL, seed=1), SequenceMesh.single(), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_of_a_kernel_allows_rounding(dtype):
    model = random_dit(SMALL, seed=1).to(dtype)
    for name in ("sdpa", "math"):
        model.attention = name
        check_kernel(model, CPU)
        assert model.attention == name


def test_a_cpu_computes_auto_with_sdpa(base):
    """P3: the bits are those of `attention: sdpa`, and the identity names the kernel that ran, not "auto"."""
    auto = HunyuanVideoPipeline.from_pretrained(base, device="cpu", attention="auto", **FP32)
    named = HunyuanVideoPipeline.from_pretrained(base, device="cpu", attention="sdpa", **FP32)
    first, second = (each("A cat", output="latents", **SIZE) for each in (auto, named))
    assert np.array_equal(first, second)
    assert auto.identity() == named.identity() == named.engine.identity()
    assert auto.engine.identity()["attention"] == "auto"
    assert (auto.engine.open_options(), named.engine.open_options()) == (("attention",), ())


def test_sample_records_the_kernel_that_it_chose(base, tmp_path):
    flags = ["--model-base", str(base), "--device", "cpu", "--precision", "fp32", "--vae-precision", "fp32"]
    flags += ["--text-encoder-precision", "fp32", "--video-size", "32", "48", "--video-length", "5"]
    flags += ["--infer-steps", "2", "--attention", "auto", "--latents-only", "--seed", "1"]
    assert main([*flags, "--prompt", "A cat", "--save-path", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.safetensors")
    _, record = read_latents(file)
    assert record["engine"]["attention"] == "sdpa"


def test_a_choice_of_the_run_is_kept(base):
    """P3: a rank with a choice of the run computes with it, although it would choose another kernel."""
    engine = HunyuanVideo(model_base=base, attention="auto", **FP32)
    denoiser = engine.join(replace(ALONE, choices={"attention": "math"}))
    assert denoiser.choices() == {"attention": "math"}
    assert denoiser._model.attention == "math"
    chooses = engine.join(ALONE)
    assert chooses.choices() == {"attention": "sdpa"}
    chooses.use_choices({"attention": "math"})
    assert (chooses.choices(), chooses._model.attention) == ({"attention": "math"}, "math")


@pytest.mark.parametrize("name", ["cudnn", "fa3", "fa4"])
def test_a_choice_that_this_node_cannot_run_is_a_fault_of_the_node(base, name):
    """P5: it names the kernel and the reason, and does not end the run: another node may run it."""
    engine = HunyuanVideo(model_base=base, attention="auto", **FP32)
    with pytest.raises(DeviceError, match=f"has chosen attention '{name}'.*this node cannot run it"):
        engine.join(replace(ALONE, choices={"attention": name}))
    with pytest.raises(DeviceError, match="this node cannot run it"):
        engine.join(ALONE).use_choices({"attention": name})


def test_an_unknown_choice_is_an_error_of_the_root(base):
    engine = HunyuanVideo(model_base=base, attention="auto", **FP32)
    with pytest.raises(UserError, match=r"'os\.system', which is unknown"):
        engine.join(replace(ALONE, choices={"attention": "os.system"}))


def test_a_named_kernel_ignores_choices(base):
    engine = HunyuanVideo(model_base=base, attention="sdpa", **FP32)
    denoiser = engine.join(replace(ALONE, choices={"attention": "math"}))
    assert (denoiser.choices(), denoiser._model.attention) == ({}, "sdpa")
