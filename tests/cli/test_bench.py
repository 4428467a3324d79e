"""`hv-batch bench engine`: the counts are right, and the report shows the measurements."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from hv_batch.architecture import DiTConfig, VAEConfig
from hv_batch.bench import stage_workloads
from hv_batch.bench.measure import Times, measure_matmul_peak, median_ratio, probe, time_in_turns
from hv_batch.bench.presets import PRESETS
from hv_batch.bench.stage_workloads import STAGES
from hv_batch.cli.main import app
from hv_batch.engine.vae.kernels import convolve
from hv_batch.protocol import UserError

CPU = torch.device("cpu")


def bench(*options):
    result = CliRunner().invoke(app, ["bench", "engine", "--preset", "toy", "--device", "cpu", *options])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_stage_is_timed_next_to_diffusers():
    """The JSON report covers all three stages, and its numbers are consistent."""
    output = json.loads(bench("--rounds", "2", "--threads", "1", "--json"))
    assert output["machine"].startswith("cpu: 1 threads")
    assert [report["stage"] for report in output["stages"]] == ["text", "dit", "vae"]
    for report in output["stages"]:
        theirs = report["diffusers"]
        assert 0 < report["best_s"] <= report["median_s"]
        assert report["gflops"] == pytest.approx(report["gflop"] / report["best_s"])
        assert report["of_matmul_peak"] > 0
        assert theirs["ratio_best"] == pytest.approx(report["best_s"] / theirs["best_s"])
        assert report["gflop"] < theirs["gflop"], "hv_batch must skip two layers, padded text and repeated kernel taps"


def test_one_stage_can_be_selected():
    """The text report has a header and one line for each implementation of each stage."""
    lines = bench("--rounds", "1", "--stage", "dit", "--fp8").splitlines()
    assert len(lines) == 4
    assert "preset toy" in lines[0]
    assert lines[2].startswith("dit ")
    assert "FP8 products" in lines[2]
    assert lines[3].strip().startswith("diffusers")
    assert "hv_batch takes" in lines[3]


def test_without_diffusers_hv_batch_is_timed_alone(monkeypatch):
    """diffusers is a dependency of the tests only. The report states that it is missing."""
    monkeypatch.setattr(stage_workloads, "find_spec", lambda _name: None)
    output = bench("--rounds", "1", "--stage", "text")
    assert "diffusers is not installed" in output
    assert "hv_batch takes" not in output


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (["--preset", "huge"], "toy, mid, 540p, 720p"),
        (["--stage", "sampler"], "text, dit, vae"),
        (["--device", "tpu"], "auto, cpu, cuda"),
    ],
)
def test_unknown_names_are_refused_with_the_allowed_values(options, allowed):
    """P6: the names are checked before a model is built."""
    with pytest.raises(UserError, match=allowed):
        bench(*options)


def test_both_implementations_compute_the_same():
    """The comparison is fair: equal weights give equal text states, and the DiT outputs have equal shapes."""
    torch.manual_seed(0)
    preset = PRESETS["toy"]
    text = STAGES["text"](preset, CPU)
    (ours,), (states, pooled, mask) = text.ours(), text.theirs()()
    length = int(mask.sum())
    assert torch.allclose(ours.states, states[0, :length], atol=1e-5)
    assert torch.allclose(ours.pooled, pooled[0], atol=1e-5)

    velocity = STAGES["dit"](preset, CPU)
    assert velocity.ours().shape == velocity.theirs()().sample.shape


def test_operations_of_cpu_kernels_are_counted():
    """The FLOP counts of a matrix product, attention and convolution equal the formulas."""
    a, b = torch.randn(30, 20), torch.randn(20, 10)
    assert probe(lambda: a @ b, CPU).flop == 2 * 30 * 20 * 10
    q, k = torch.randn(1, 2, 7, 16), torch.randn(1, 2, 9, 16)
    with torch.no_grad():
        assert probe(lambda: F.scaled_dot_product_attention(q, k, k), CPU).flop == 2 * (2 * 2 * 7 * 9 * 16)
    x, weight = torch.randn(1, 8, 4, 5, 6), torch.randn(16, 8, 3, 3, 3)
    assert probe(lambda: convolve(x, weight, None), CPU).flop == 2 * 27 * 8 * 16 * (2 * 3 * 4)


def test_peak_memory_is_that_of_the_run():
    """A temporary of 64 MB appears in the peak; a function that allocates nothing has none."""
    peak = probe(lambda: torch.ones(2**24), CPU).peak_bytes
    if peak is None:
        pytest.skip("this system does not report peak memory")
    assert 0.9 * 2**26 <= peak <= 1.5 * 2**26
    assert probe(lambda: None, CPU).peak_bytes <= 2**23


def test_implementations_alternate():
    """The order is A B A B, so that other load on the machine slows both."""
    calls: list[str] = []
    times = time_in_turns([lambda: calls.append("a"), lambda: calls.append("b")], 3, CPU)
    assert "".join(calls) == "ababab"
    assert [len(taken.seconds) for taken in times] == [3, 3]


def test_ratios_are_taken_round_by_round():
    """One disturbed round does not change the median ratio."""
    assert median_ratio(Times((1.0, 9.0, 2.0)), Times((2.0, 2.0, 4.0))) == 0.5
    assert Times((3.0, 1.0, 2.0)).best == 1.0
    assert Times((3.0, 1.0, 2.0)).median == 2.0


def test_the_peak_is_measured_in_the_dtype():
    assert measure_matmul_peak(CPU, torch.float32) > 1e8


def test_gpu_presets_are_the_released_model():
    """Spec sections 2 and 5: the presets have the released widths, the two released sizes and the released dtypes."""
    for name, (rows, columns) in {"540p": (68, 120), "720p": (90, 160)}.items():
        preset = PRESETS[name]
        assert (preset.dit, preset.vae) == (DiTConfig(), VAEConfig())
        assert preset.dit_latents == preset.vae_latents == (33, rows, columns)
        assert (preset.text_dtype, preset.dit_dtype, preset.vae_dtype) == (
            torch.float16,
            torch.bfloat16,
            torch.float16,
        )
