"""The parts of a checkpoint are checked against each other from headers alone, before a GPU is taken (P6)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from hv_batch.architecture import DiTConfig
from hv_batch.engine.checkpoint import towers
from hv_batch.engine.checkpoint.loading import verify
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint

CONFIG = DiTConfig(**TOY_DIT)
MODEL = "hunyuan-video-t2v-720p"
LLAMA, CLIP = "text_encoder", "text_encoder_2"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def base(toy, tmp_path):
    return shutil.copytree(toy, tmp_path / "ckpts")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def problem(base, config=CONFIG):
    (sentence,) = verify(CheckpointTree(base), config)
    return sentence


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 4, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": None, "num_attention_heads": 2, "num_hidden_layers": 5},
    ],
)
def test_the_expected_shapes_of_llama_are_those_that_transformers_builds(toy, fields):
    """The shapes are computed without transformers, so they are compared with its modules."""
    values = json.loads((toy / LLAMA / "config.json").read_text()) | fields
    config = LlamaConfig(**values)
    config.num_hidden_layers -= 2
    with torch.device("meta"):
        state = LlamaModel(config).state_dict()
    read = towers._read_fields(towers.LlamaFields, values, toy)
    heads, head_dim = config.num_attention_heads, config.head_dim
    shapes = dict(towers._llama_shapes(read, heads * head_dim, config.num_key_value_heads * head_dim))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items() if name != "norm.weight"}


def test_the_expected_shapes_of_clip_are_those_that_transformers_builds(toy):
    """Equal to the modules of transformers, also for the defaults of fields that config.json omits."""
    for values in (json.loads((toy / CLIP / "config.json").read_text()), {"num_hidden_layers": 2}):
        with torch.device("meta"):
            state = CLIPTextModel(CLIPTextConfig(**values)).state_dict()
        shapes = dict(towers._clip_shapes(towers._read_fields(towers.ClipFields, values, toy)))
        given = {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in state.items()}
        assert shapes == {name: shape for name, shape in given.items() if not name.endswith("position_ids")}


@pytest.mark.parametrize(("tower", "field"), [(LLAMA, "text_states_dim"), (CLIP, "text_states_dim_2")])
def test_a_tower_of_another_width_than_the_dit_reads_is_refused(base, tower, field):
    """A tower that is complete in itself, but not that of the DiT, would fail at the first sample on a GPU."""
    model, config = (LlamaModel, LlamaConfig) if tower == LLAMA else (CLIPTextModel, CLIPTextConfig)
    values = json.loads((base / tower / "config.json").read_text()) | {"hidden_size": 96, "head_dim": None}
    model(config(**{name: value for name, value in values.items() if name != "model_type"})).save_pretrained(
        base / tower
    )
    sentence = problem(base)
    assert f"{base / tower / 'config.json'}: hidden_size is 96, but the DiT" in sentence
    assert f"has {field} {getattr(CONFIG, field)}" in sentence
    assert HunyuanVideo(model_base=base).check() == [sentence]


def _drop(name):
    return lambda base, tower: edit_tensors(base / tower, lambda tensors: tensors.pop(name))


def _replace(name, tensor):
    return lambda base, tower: edit_tensors(base / tower, lambda tensors: tensors.update({name: tensor}))


def _config(**changes):
    return lambda base, tower: edit_config(base / tower, **changes)


@pytest.mark.parametrize(
    ("tower", "damage", "message"),
    [
        (LLAMA, _drop("layers.1.mlp.up_proj.weight"), "1 missing (layers.1.mlp.up_proj.weight)"),
        (LLAMA, _replace("layers.0.input_layernorm.weight", torch.ones(3)), "is [3], must be [64]"),
        (LLAMA, _replace("embed_tokens.weight", torch.zeros(1)), "embed_tokens.weight is [1], must be ["),
        (
            LLAMA,
            _replace("layers.0.mlp.up_proj.weight", torch.zeros(128, 64, dtype=torch.int8)),
            "layers.0.mlp.up_proj.weight is int8, must be a float of 16 bits or more",
        ),
        (LLAMA, _config(intermediate_size=256), "of another shape (layers.0.mlp.gate_proj.weight is [128, 64], must"),
        (LLAMA, _config(num_hidden_layers=3), "contains 1 layer(s) more than"),
        (LLAMA, _config(num_hidden_layers=2), "num_hidden_layers is 2, allowed is at least 3"),
        (LLAMA, _config(num_key_value_heads=3), "must each be a multiple of the next"),
        (LLAMA, _config(hidden_size="64"), "hidden_size is '64', allowed is a whole number from 1 to"),
        (LLAMA, _config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, allowed is a whole number from 1"),
        (LLAMA, _config(attention_bias=1, mlp_bias=None), "attention_bias is 1, allowed is true or false; mlp_bias"),
        (CLIP, _config(hidden_size=None, vocab_size=-1), "vocab_size is -1, allowed is a whole number"),
        (CLIP, _config(max_position_embeddings=64), "max_position_embeddings is 64, allowed is at least 77"),
        (CLIP, _config(num_attention_heads=5), "must be a multiple of num_attention_heads 5"),
        (CLIP, _config(model_type="clip", text_config="x"), "text_config must be an object but is a str"),
        (CLIP, _drop("text_model.final_layer_norm.bias"), "1 missing (final_layer_norm.bias)"),
    ],
)
def test_a_tower_whose_files_do_not_belong_together_is_refused(base, tower, damage, message):
    """One sentence names the file, the tensor or the field, and the allowed value."""
    damage(base, tower)
    sentence = problem(base)
    assert message in sentence
    assert str(base / tower) in sentence


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(base):
    """Such a token would be read beyond the end of the embeddings."""
    path = base / LLAMA / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 10**6, "content": "<new>"})
    path.write_text(json.dumps(tokenizer))
    assert f"{path} has a token with the number 1000000" in problem(base)
    path.write_text('{"model": {"vocab": {"a": "b"}}}')
    assert f"{path} is damaged or not a tokenizer" in problem(base)
    path.write_text("[" * 100_000)
    assert f"{path} is not readable JSON (it is nested too deeply)" in problem(base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 33}, "has in_channels 33 and out_channels 16, allowed is 16, the latent channels of the VAE"),
        ({"patch_size": (2, 2, 2)}, "has patch_size [2, 2, 2], allowed is [1, 2, 2]"),
    ],
)
def test_a_dit_that_does_not_read_the_latents_of_the_vae_is_refused(toy, change, message):
    """An image-to-video DiT has more input channels than the VAE has latent channels."""
    assert message in verify(CheckpointTree(toy), replace(CONFIG, **change))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "128"}, "hidden_size is '128', allowed is a whole number"),
        ({"heads_num": 0}, "heads_num is 0, allowed is a whole number from 1"),
        ({"rope_dim_list": [8, 8]}, "rope_dim_list is [8, 8], allowed is a list of three whole numbers"),
        ({"rope_dim_list": [8, 4, 6]}, "DiT config: rope_dim_list [8, 4, 6] must be three even numbers"),
        ({"mm_double_blocks_depth": 10**9, "guidance_embed": "no"}, "guidance_embed is 'no', allowed is true or false"),
        ({"mlp_width_ratio": float("nan")}, "mlp_width_ratio is nan, allowed is a number from 0"),
        ({"hidden_sizes": 1}, "'hidden_sizes' is not a field of this model's DiT"),
    ],
)
def test_a_wrong_config_of_the_dit_is_reported_in_one_sentence(base, changes, message):
    """P6: the sentence names the file. A wrong type does not end in a traceback, and a billion layers are not built."""
    folder = base / MODEL / "transformers"
    edit_config(folder, **changes)
    with pytest.raises(UserError) as error:
        HunyuanVideo(model_base=base)
    assert str(error.value).startswith(f"{folder / 'config.json'}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": 16}, "block_out_channels is 16, allowed is a list of whole numbers"),
        ({"layers_per_block": 2.5}, "layers_per_block is 2.5, allowed is a whole number from 1"),
        ({"scaling_factor": "0.4"}, "scaling_factor is '0.4', allowed is a number"),
        ({"norm_num_groups": 0}, "norm_num_groups is 0, allowed is a whole number from 1"),
        ({"down_block_types": None}, "down_block_types is None, but only"),
    ],
)
def test_a_wrong_config_of_the_vae_is_reported_in_one_sentence(base, changes, message):
    """P6: the sentence names the file and the field."""
    edit_config(base / MODEL / "vae", **changes)
    sentence = problem(base)
    assert sentence.startswith(str(base / MODEL / "vae" / "config.json"))
    assert message in sentence
