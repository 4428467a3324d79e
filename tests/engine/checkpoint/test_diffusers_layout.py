"""A checkpoint in diffusers' layout, written by diffusers itself, loads as the same model as the released layout."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, CLIPTextModel

from hv_batch.architecture import DiTConfig
from hv_batch.engine.checkpoint.digests import revision
from hv_batch.engine.checkpoint.loading import load_dit, load_vae, vae_config, verify
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.engine.text_encoders import TextTowers
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from tests.support.dit_reference import reference_model

CPU = torch.device("cpu")
CONFIG = DiTConfig(**TOY_DIT)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def theirs(released, tmp_path_factory):
    """The same weights, saved by diffusers and transformers: shards for the DiT, one file for each other part."""
    base = tmp_path_factory.mktemp("diffusers")
    tree = CheckpointTree(released)
    dit = load_dit(tree, CONFIG, "sdpa", torch.float32, CPU)
    reference_model(dit).save_pretrained(base / "transformer", max_shard_size="2MB")
    config = vae_config(tree)
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
    )
    vae.load_state_dict(load_vae(tree, torch.float32, CPU).state_dict())
    vae.save_pretrained(base / "vae")
    AutoModel.from_pretrained(tree.text_encoder).save_pretrained(base / "text_encoder")
    CLIPTextModel.from_pretrained(tree.text_encoder_2).save_pretrained(base / "text_encoder_2")
    for tokenizer, folder in ((tree.text_encoder, "tokenizer"), (tree.text_encoder_2, "tokenizer_2")):
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(base / folder)
    (base / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideoPipeline"}))
    return base


@pytest.fixture
def base(theirs, tmp_path):
    return shutil.copytree(theirs, tmp_path / "ckpts")


def shards(base):
    return sorted((base / "transformer").glob("*.safetensors"))


def test_every_tensor_is_the_released_one_bit_for_bit(released, theirs):
    """The translation renames, concatenates and swaps without arithmetic; the DiT is stored in several shards."""
    assert len(shards(theirs)) > 1
    ours, converted = (
        load_dit(CheckpointTree(base), CONFIG, "sdpa", torch.float32, CPU).state_dict() for base in (released, theirs)
    )
    assert all(torch.equal(converted[name], tensor) for name, tensor in ours.items())
    vaes = [load_vae(CheckpointTree(base), torch.float32, CPU).state_dict() for base in (released, theirs)]
    assert all(torch.equal(vaes[1][name], tensor) for name, tensor in vaes[0].items())


def test_text_states_are_the_same(released, theirs):
    """The tokenizers are in separate folders, and the embeddings are equal."""
    encoded = []
    for base in (released, theirs):
        tree = CheckpointTree(base)
        folders = (tree.text_encoder, tree.text_encoder_2)
        towers = TextTowers(
            *folders, device=CPU, dtype=torch.float32, llama_tokenizer=tree.tokenizer, clip_tokenizer=tree.tokenizer_2
        )
        encoded += towers.encode(["A cat walks on the grass, realistic."], image=False)
    assert torch.equal(encoded[0].states, encoded[1].states)
    assert torch.equal(encoded[0].pooled, encoded[1].pooled)


def test_a_render_is_the_same_bit_for_bit(released, theirs):
    """Frames are equal in fp32, and the widths are read from transformer/config.json, not from an option."""
    size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
    precisions = dict.fromkeys(("precision", "vae_precision", "text_encoder_precision"), "fp32")
    ours = HunyuanVideoPipeline.from_pretrained(released, device="cpu", dit=TOY_DIT, **precisions)("A cat", **size)
    converted = HunyuanVideoPipeline.from_pretrained(theirs, device="cpu", **precisions)("A cat", **size)
    assert np.array_equal(ours, converted)


def test_the_dit_folder_alone_may_be_the_dit(released, theirs):
    """`dit_weight` may be diffusers' transformer folder, with a released tree; it is detected by its tensor names."""
    tree = CheckpointTree(released, dit_weight=theirs / "transformer")
    assert HunyuanVideo(model_base=released, dit_weight=theirs / "transformer").check() == []
    assert tree.dit_options()["hidden_size"] == TOY_DIT["hidden_size"]
    load_dit(tree, CONFIG, "sdpa", torch.float32, CPU)


def test_the_tree_is_checked_like_a_released_one(base):
    """P6: a missing shard, tokenizer or VAE is named with its path. P2: a changed shard changes the revision."""
    tree = CheckpointTree(base)
    assert verify(tree, CONFIG) == []
    before = revision(tree)
    shard = shards(base)[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    after = revision(tree)
    assert [part for part in after if after[part] != before[part]] == ["dit"]
    assert list(after)[2:] == ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]

    shard.unlink()
    (base / "tokenizer_2" / "tokenizer_config.json").unlink()
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    message = tree.missing()
    expected = (shard.name, "diffusion_pytorch_model.safetensors does not exist", "tokenizer_2/tokenizer_config.json")
    assert [name in sentence for name, sentence in zip(expected, message, strict=True)] == [True] * 3


def test_a_part_of_a_fused_tensor_that_is_missing_is_named(base):
    """P6: q, k and v are separate in diffusers' layout; the error names the missing one."""
    for shard in shards(base):
        tensors = load_file(shard)
        tensors.pop("transformer_blocks.1.attn.to_k.weight", None)
        save_file(tensors, shard)
    (message,) = verify(CheckpointTree(base), CONFIG)
    assert "double_blocks.1.img_attn_qkv.weight consists of attn.to_q, attn.to_k, attn.to_v" in message
    assert "of which attn.to_k is missing" in message


def test_an_unknown_tensor_is_named(base):
    """P6: extra tensors are reported, in this layout as well."""
    shard = shards(base)[0]
    save_file(load_file(shard) | {"transformer_blocks.0.lora.weight": torch.zeros(1)}, shard)
    (message,) = verify(CheckpointTree(base), CONFIG)
    assert "1 not of this model (transformer_blocks.0.lora.weight)" in message


@pytest.mark.parametrize(
    ("key", "value"), [("_class_name", "WanTransformer3DModel"), ("image_condition_type", "latent_concat")]
)
def test_another_model_is_refused_by_its_config(base, key, value):
    """P6: the image-to-video model, which has the same names and nearly the same shapes, is refused by its config."""
    path = base / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{key} is '{value}', but only"):
        HunyuanVideo(model_base=base)


def test_a_damaged_index_is_reported(base):
    """P6: a truncated index gives a message, not a traceback."""
    index = base / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text()[:100])
    message, _layout = verify(CheckpointTree(base), CONFIG)
    assert "is not readable JSON" in message
