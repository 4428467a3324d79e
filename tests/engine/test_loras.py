"""Videos with LoRAs: the bits of a video depend on its own LoRAs only, in every mode of the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hv_batch.architecture import DiTConfig
from hv_batch.engine.dit.fp8_storage import quantise
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.engine.text_encoders import TextEmbedding
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from tests.support.dit_reference import ALONE, SMALL_VIDEO
from tests.support.lora_files import diffusers, official, random_adapter, write

CONFIG = DiTConfig(**TOY_DIT)
FP8_FILE = Path("hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states_fp8.pt")
TEXT = TextEmbedding(
    states=torch.randn(5, CONFIG.text_states_dim, generator=torch.Generator().manual_seed(0)),
    pooled=torch.randn(CONFIG.text_states_dim_2, generator=torch.Generator().manual_seed(1)),
    num_tokens=4,
    tokens_lost=0,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As every part of the engine on a CPU: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy tree, with FP8 weights and their map beside those in bf16."""
    base = write_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    folder = base / FP8_FILE.parent
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    scales = {}
    for name, tensor in state.items():
        if name.startswith(("double_blocks.", "single_blocks.")) and name.endswith(".weight") and tensor.dim() == 2:
            state[name], scales[name.removesuffix(".weight")] = quantise(tensor)
    torch.save({"module": state}, base / FP8_FILE)
    torch.save(scales, folder / "mp_rank_00_model_states_fp8_map.pt")
    return base


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """`film` changes every Linear of the blocks, `grain` only some of them."""
    folder = tmp_path_factory.mktemp("loras")
    film = write(folder / "film.safetensors", official(random_adapter(CONFIG, seed=1)))
    grain = diffusers(random_adapter(CONFIG, seed=2, only="double_blocks.1"), CONFIG.hidden_size)
    return {"film": {"path": film, "strength": 0.5}, "grain": str(write(folder / "grain.safetensors", grain))}


def engine(toy, loras, **options):
    if "dit_weight" in options:
        options["dit_weight"] = toy / options["dit_weight"]
    return HunyuanVideo(**{"model_base": toy, "dit": TOY_DIT, "precision": "bf16", "loras": loras} | options)


def render(denoiser, lora=""):
    return denoiser.denoise(replace(SMALL_VIDEO, lora=lora), TEXT, None, lambda *_: None)


MODES = {
    "bf16": {},
    "fp32": {"precision": "fp32"},
    "matmul": {"fp8": "matmul"},
    "offload": {"offload": "blocks"},
    "matmul-offload": {"fp8": "matmul", "offload": "blocks"},
    "fp8-file": {"dit_weight": FP8_FILE},
    "fp8-file-storage": {"dit_weight": FP8_FILE, "fp8": "storage"},
    "fp8-file-storage-offload": {"dit_weight": FP8_FILE, "fp8": "storage", "offload": "blocks"},
    "fp8-file-matmul": {"dit_weight": FP8_FILE, "fp8": "matmul"},
}
QUICK = ("bf16", "offload", "fp8-file-storage", "matmul-offload")


@pytest.mark.parametrize("mode", [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in MODES if m not in QUICK)])
def test_a_video_has_the_same_bits_after_others_with_other_loras_as_alone(toy, loras, mode):
    """P3: LoRAs are taken out by reading the checkpoint again, so that nothing of them stays in the weights."""
    sequence = ["film", "film,grain", "", "grain:0.3", "film"]
    denoiser = engine(toy, loras, **MODES[mode]).join(ALONE)
    after_others = [render(denoiser, lora) for lora in sequence]
    alone = {lora: render(engine(toy, loras, **MODES[mode]).join(ALONE), lora) for lora in set(sequence)}
    for lora, latents in zip(sequence, after_others, strict=True):
        assert np.array_equal(latents, alone[lora]), lora
    without = render(engine(toy, {}, **MODES[mode]).join(ALONE))
    assert np.array_equal(alone[""], without)
    assert len({latents.tobytes() for latents in alone.values()}) == len(alone)


def test_offloaded_weights_render_the_same_bits(toy, loras):
    kept, offloaded = (render(engine(toy, loras, offload=where).join(ALONE), "film") for where in ("none", "blocks"))
    assert np.array_equal(kept, offloaded)


@pytest.mark.parametrize("mode", ["matmul", "fp8-file-storage", "fp8-file-matmul"])
def test_a_lora_has_its_full_strength_on_fp8_weights(toy, loras, mode):
    """Adding to the 8-bit numbers themselves would apply it at a tenth of its strength."""
    change = {}
    for name in ("bf16", mode):
        denoiser = engine(toy, loras, **MODES[name]).join(ALONE)
        change[name] = render(denoiser, "film:1") - render(denoiser)
    full, quantised = change["bf16"], change[mode]
    size = np.linalg.norm(full)
    assert np.vdot(full, quantised) / size**2 > 0.95
    assert np.linalg.norm(quantised - full) / size < 0.3


def test_a_strength_of_zero_renders_the_bits_of_the_base(toy, loras):
    denoiser = engine(toy, loras).join(ALONE)
    assert np.array_equal(render(denoiser, "film:0"), render(denoiser))


def test_the_strength_of_a_video_replaces_that_of_the_file(toy, loras):
    denoiser = engine(toy, loras).join(ALONE)
    assert np.array_equal(render(denoiser, "film"), render(denoiser, "film:0.5"))
    assert not np.array_equal(render(denoiser, "film"), render(denoiser, "film:1.0"))


def test_after_a_failed_merge_the_next_video_has_the_bits_of_one_alone(toy, loras, tmp_path):
    """A file that has become unusable stops in the middle of a merge; no weight of it stays."""
    adapter = random_adapter(CONFIG, seed=3)
    adapter["txt_in.individual_token_refiner.blocks.1.self_attn_proj"][1][0, 0] = torch.nan
    broken = {**loras, "broken": str(write(tmp_path / "broken.safetensors", official(adapter)))}
    denoiser = engine(toy, broken).join(ALONE)
    with pytest.raises(UserError, match=r"broken\.safetensors contains NaN"):
        render(denoiser, "broken")
    assert np.array_equal(render(denoiser, "film"), render(engine(toy, loras).join(ALONE), "film"))


CALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "output": "latents"}


@pytest.fixture(scope="module")
def options(loras):
    return {"device": "cpu", "dit": TOY_DIT, "precision": "fp32", "text_encoder_precision": "fp32", "loras": loras}


def test_the_pipeline_takes_any_form_of_the_names(toy, options):
    pipeline = HunyuanVideoPipeline.from_pretrained(toy, **options)
    film = pipeline("a cat", lora=["grain", "film : 0.50"], **CALL)
    assert np.array_equal(film, pipeline("a cat", lora="film:0.5,grain", **CALL))
    assert not np.array_equal(film, pipeline("a cat", **CALL))
    with pytest.raises(UserError, match="has no LoRA 'anime'; its option loras has film, grain"):
        pipeline("a cat", lora="anime", **CALL)
    with pytest.raises(UserError, match="Paths are not allowed"):
        pipeline("a cat", lora="/tmp/film.safetensors", **CALL)


@pytest.mark.slow
def test_the_ranks_of_a_group_merge_the_same_weights(toy, options):
    one = HunyuanVideoPipeline.from_pretrained(toy, **options)("a cat", lora="film:0.5,grain", **CALL)
    with HunyuanVideoPipeline.from_pretrained(toy, ulysses_degree=2, **options) as group:
        np.testing.assert_allclose(group("a cat", lora="film:0.5,grain", **CALL), one, rtol=1e-3, atol=1e-3)


# Preflight and identity -----------------------------------------------------------------------------------------------


def test_all_unusable_loras_are_found_before_weights_are_loaded(toy, loras, tmp_path):
    """P6: all at once, from the driver, with the name in the config, the file and the key."""
    adapter = random_adapter(CONFIG, only="double_blocks.0.img_attn_proj")
    adapter["double_blocks.0.img_attn_proj"][0][0, 0] = torch.inf
    other = {"transformer.blocks.0.lora_A.weight": torch.ones(1)}
    files = {
        "nan": str(write(tmp_path / "nan.safetensors", official(adapter))),
        "other": str(write(tmp_path / "other.safetensors", other)),
        "absent": str(tmp_path / "absent.safetensors"),
        **loras,
    }
    problems = engine(toy, files).check()
    assert [problem.partition(":")[0] for problem in problems] == ["loras.absent", "loras.nan", "loras.other"]
    assert "transformer.blocks.0.lora_A.weight" in problems[2]


@pytest.mark.parametrize(
    "option",
    [
        {"none": "a.safetensors"},
        {"a/b": "a.safetensors"},
        {"a": {"strength": 1.0}},
        {"a": {"path": "a.safetensors", "strenght": 1.0}},
        {"a": {"path": "a.safetensors", "strength": float("nan")}},
        {"a": 3},
        ["a.safetensors"],
    ],
)
def test_options_that_are_not_allowed_are_refused(toy, option):
    with pytest.raises(UserError, match="engine option loras"):
        engine(toy, option)


def test_streaming_from_the_checkpoint_file_is_refused(toy, loras):
    with pytest.raises(UserError, match="offload blocks or none"):
        engine(toy, loras, offload="mapped")


def test_files_and_strengths_are_part_of_the_identity_if_there_are_any(toy, loras):
    """P2, P3: without LoRAs, the identity of older runs stays the same."""
    assert "loras" not in engine(toy, {}).identity()
    identity = engine(toy, loras).identity()["loras"]
    assert identity["film"]["strength"] == 0.5
    assert {len(entry["sha256"]) for entry in identity.values()} == {64}
    swapped = {"film": loras["grain"], "grain": loras["grain"]}
    assert engine(toy, swapped).identity()["loras"]["film"] != identity["film"]
