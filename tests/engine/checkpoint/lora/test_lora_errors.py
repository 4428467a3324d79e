"""A LoRA file that does not fit is refused, with the file and the key; nothing is ignored silently."""

from __future__ import annotations

import json

import pytest
import torch

from hv_batch.architecture import DiTConfig
from hv_batch.engine.checkpoint.loading import dit_shapes
from hv_batch.engine.checkpoint.lora.adapter import check_values, digest_adapter, open_adapter
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import TOY_DIT
from tests.support.lora_files import RANK, diffusion_pipe, official, random_adapter, write

CONFIG = DiTConfig(**TOY_DIT)
SHAPES = dit_shapes(CONFIG)
KEY = "transformer.double_blocks.0.img_attn_proj"
WIDTH = CONFIG.hidden_size


def tensors(**changes):
    pair = diffusion_pipe(random_adapter(CONFIG, only="double_blocks.0.img_attn_proj"))
    return pair | {f"{KEY}.{name.replace('__', '.')}": value for name, value in changes.items()}


def refused(path):
    with pytest.raises(UserError) as error:
        open_adapter(path, SHAPES)
    assert str(path) in str(error.value) or path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (tensors() | {"transformer.double_blocks.9.img_attn_proj.lora_A.weight": torch.ones(RANK, WIDTH)}, "blocks.9"),
        (tensors() | {"transformer.blocks.0.to_q.lora_A.weight": torch.ones(1)}, "transformer.blocks.0.to_q.lora_A"),
        (tensors() | {"conv.weight": torch.ones(1)}, "conv.weight"),
        (tensors(lora_B__bias=torch.ones(WIDTH)), f"{KEY}.lora_B.bias"),
        (tensors(lora_A__weight=torch.ones(RANK, WIDTH + 1)), f"lora_A.weight is [{RANK}, {WIDTH + 1}], must be"),
        (tensors(lora_B__weight=torch.ones(WIDTH, RANK + 1)), f"lora_B.weight is [{WIDTH}, {RANK + 1}], must be"),
        (tensors(diff_b=torch.ones(WIDTH + 1)), "diff_b is"),
        (tensors(lora_A__weight=torch.ones(RANK, WIDTH, dtype=torch.int8)), "lora_A.weight is int8"),
        (tensors(alpha=torch.tensor(torch.nan)), f"{KEY}.alpha"),
        (tensors(alpha=torch.ones(2)), f"{KEY}.alpha"),
        ({f"{KEY}.lora_A.weight": torch.ones(RANK, WIDTH)}, "lack the other matrix"),
        ({}, "no LoRA"),
        # The same part under its official name and under ComfyUI's.
        (tensors() | official(random_adapter(CONFIG, only="double_blocks.0.img_attn_proj")), "repeat"),
    ],
)
def test_a_key_that_does_not_fit_is_an_error_that_names_it(tmp_path, content, named):
    assert named in refused(write(tmp_path / "film.safetensors", content))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj.hada_w1_a", "LoHa"),
        ("lora_unet_double_blocks_0_img_attn_proj.lokr_w1", "LoKr"),
        (f"{KEY}.dora_scale", "DoRA"),
        (f"{KEY}.lora_magnitude_vector.weight", "DoRA"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_k.lora_down.weight", "OneTrainer"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, key, kind):
    assert kind in refused(write(tmp_path / "film.safetensors", tensors() | {key: torch.ones(1)}))


def test_all_keys_of_another_model_are_one_message(tmp_path):
    """A LoRA of Wan: every key is counted, and some are named."""
    keys = {f"diffusion_model.blocks.{i}.self_attn.q.lora_A.weight": torch.ones(1, 2) for i in range(40)}
    assert "40 match no part of the model (diffusion_model.blocks.0" in refused(write(tmp_path / "a.safetensors", keys))


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x01\x02")
    torch.save({}, tmp_path / "a.pt")
    refused(tmp_path / "a.safetensors")
    refused(tmp_path / "a.pt")
    refused(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "values",
    [
        *({"use_dora": True}, {"lora_alpha": "x"}, {"lora_alpha": 10**400}, {"r": RANK + 1}),
        *({"alpha_pattern": [1]}, {"alpha_pattern": {"a": 10**400}}),
    ],
)
def test_options_of_peft_that_would_be_lost_are_refused(tmp_path, values):
    path = write(tmp_path / "film.safetensors", tensors())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, **values}))
    with pytest.raises(UserError, match=r"adapter_config|config"):
        open_adapter(path, SHAPES)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_an_error_that_names_its_key(tmp_path, value):
    content = tensors()
    content[f"{KEY}.lora_B.weight"][0, 0] = value
    with pytest.raises(UserError, match=rf"film\.safetensors contains NaN or infinity at {KEY}\.lora_B\.weight"):
        check_values(write(tmp_path / "film.safetensors", content))


def test_the_digest_covers_every_byte_and_the_alpha_beside_the_file(tmp_path):
    """P2, P3: what changes pixels changes the digest; the name of the file does not."""
    content = tensors()
    first = digest_adapter(write(tmp_path / "a" / "film.safetensors", content))
    assert digest_adapter(write(tmp_path / "b" / "other.safetensors", content)) == first
    (tmp_path / "b" / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert digest_adapter(tmp_path / "b" / "other.safetensors") != first
    content[f"{KEY}.lora_B.weight"][-1, -1] += 1
    assert digest_adapter(write(tmp_path / "c" / "film.safetensors", content)) != first
