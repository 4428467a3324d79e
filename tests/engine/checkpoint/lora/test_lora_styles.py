"""LoRA files of every supported style give the same merged weights; diffusers and PEFT are the reference."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from hv_batch.architecture import DiTConfig
from hv_batch.engine.checkpoint.loading import dit_shapes
from hv_batch.engine.checkpoint.lora.merge import LoraFile, LoraMerger
from hv_batch.engine.checkpoint.tensor_files import stored
from hv_batch.toy.checkpoint import TOY_DIT
from tests.support import lora_files
from tests.support.dit_reference import random_dit, random_inputs, reference_model, to_diffusers
from tests.support.lora_files import ALPHA, RANK, random_adapter, write

CPU = torch.device("cpu")
CONFIG = DiTConfig(**TOY_DIT)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices of the toy are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def merger(model, path):
    base = {name: stored(tensor.clone()) for name, tensor in model.state_dict().items()}
    return LoraMerger(model, base, dit_shapes(CONFIG), {"x": LoraFile(path)}, torch.float32, CPU)


def assert_merges(path, strength, adapter):
    """The file merges as `adapter` with `strength` (alpha / rank included)."""
    model = random_dit(CONFIG, seed=1)
    expected = lora_files.merged(model.state_dict(), adapter, strength)
    merger(model, path).use("x")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


STYLES = {
    "official": (lora_files.official, ALPHA / RANK),
    "diffusion-pipe": (lora_files.diffusion_pipe, 1.0),
    "comfyui": (lora_files.comfy, ALPHA / RANK),
    "comfyui-diff": (lora_files.comfy_differences, ALPHA / RANK),
    "diffusers": (lambda adapter: lora_files.diffusers(adapter, CONFIG.hidden_size), 1.0),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_merges_to_the_same_weights(tmp_path, style):
    """Fused qkv, linear1 and linear2, and the final layer whose halves diffusers swaps are among the modules."""
    convert, strength = STYLES[style]
    adapter = random_adapter(CONFIG)
    assert_merges(write(tmp_path / "x.safetensors", convert(adapter)), strength, adapter)


def test_a_bias_difference_is_added_to_the_bias(tmp_path):
    difference = torch.randn(CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "x.safetensors", {"diffusion_model.double_blocks.1.img_attn.proj.diff_b": difference})
    model = random_dit(CONFIG, seed=1)
    before = model.double_blocks[1].img_attn_proj.bias.clone()
    merger(model, path).use("x")
    assert torch.equal(model.double_blocks[1].img_attn_proj.bias, before + difference)


# Alpha ----------------------------------------------------------------------------------------------------------------


def test_alpha_comes_from_the_header_of_diffusers(tmp_path):
    adapter, metadata = random_adapter(CONFIG), {"transformer.r": RANK, "transformer.lora_alpha": 2}
    path = write(tmp_path / "x.safetensors", lora_files.diffusion_pipe(adapter), metadata)
    assert_merges(path, 2 / RANK, adapter)


def test_alpha_comes_from_the_config_beside_the_file(tmp_path):
    adapter = random_adapter(CONFIG)
    path = write(tmp_path / "x.safetensors", lora_files.diffusion_pipe(adapter))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8, "use_rslora": True}))
    assert_merges(path, 8 / RANK**0.5, adapter)


def test_alpha_of_one_module_comes_from_the_pattern(tmp_path):
    adapter = random_adapter(CONFIG, only="double_blocks.0.img_attn_proj")
    metadata = {"r": RANK, "lora_alpha": 4, "alpha_pattern": {"double_blocks.0.img_attn_proj": 12}}
    assert_merges(write(tmp_path / "x.safetensors", lora_files.diffusion_pipe(adapter), metadata), 3.0, adapter)


# The reference --------------------------------------------------------------------------------------------------------

TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("proj_mlp", "proj_out", "norm1.linear", "norm.linear", "norm_out.linear", "ff.net.0.proj", "ff.net.2", "proj_in"),
]


@pytest.fixture(scope="module")
def peft_model():
    """diffusers' transformer with a random adapter of PEFT, and our model with the same base weights."""
    ours = random_dit(CONFIG, seed=1)
    theirs = reference_model(ours)
    pattern = {"transformer_blocks.0.attn.to_q": 24}
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=6, target_modules=TARGETS, alpha_pattern=pattern))
    draw = torch.Generator().manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return ours, theirs.eval()


@torch.no_grad()
def test_files_of_diffusers_and_peft_render_as_they_do_there(peft_model, tmp_path):
    """The weights equal those that diffusers fuses, and the velocity equals that of PEFT's unmerged adapter."""
    ours, theirs = peft_model
    HunyuanVideoPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(theirs, adapter_name="default"),
        transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    (path,) = tmp_path.glob("*.safetensors")
    assert all(key.startswith("transformer.") for key in load_file(path))
    merger(ours, path).use("x")

    inputs = random_inputs(CONFIG, (2, 4, 6), [7], seed=3, padded=7)
    velocity = theirs(
        hidden_states=inputs["latents"],
        timestep=inputs["timestep"],
        encoder_hidden_states=inputs["text_states"],
        encoder_attention_mask=torch.ones(1, 7),
        pooled_projections=inputs["pooled"],
        guidance=inputs["guidance"],
        return_dict=False,
    )[0]
    torch.testing.assert_close(ours(**inputs), velocity, rtol=1e-4, atol=1e-4)

    theirs.fuse_lora()
    fused = {name.replace(".base_layer", ""): t for name, t in theirs.state_dict().items() if "lora_" not in name}
    for name, tensor in to_diffusers(ours.state_dict(), CONFIG.hidden_size).items():
        torch.testing.assert_close(tensor, fused[name], rtol=1e-5, atol=1e-6)
