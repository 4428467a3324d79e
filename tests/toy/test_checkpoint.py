"""hv_batch.toy.checkpoint: released layout, reproducible bytes, and renders with visible content."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hv_batch.architecture import DiTConfig
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.engine.text_encoders import IMAGE_TEMPLATE, VIDEO_TEMPLATE
from hv_batch.engine.vae.model import CausalVAE, parse_vae_config
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint

DIT = "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"
DIT_CONFIG = "hunyuan-video-t2v-720p/transformers/config.json"
VAE = "hunyuan-video-t2v-720p/vae/pytorch_model.pt"


@pytest.fixture(scope="module")
def model_base(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


def digests(base: Path) -> dict[str, str]:
    return {
        str(path.relative_to(base)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(base.rglob("*"))
        if path.is_file()
    }


def test_tree_is_the_released_one(model_base):
    """Spec 7: the tree has the files of the released checkpoint, the config of the DiT and the licence."""
    assert set(digests(model_base)) == {
        DIT,
        DIT_CONFIG,
        VAE,
        "licence.json",
        "hunyuan-video-t2v-720p/vae/config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/tokenizer.json",
        "text_encoder/tokenizer_config.json",
        "text_encoder_2/config.json",
        "text_encoder_2/merges.txt",
        "text_encoder_2/model.safetensors",
        "text_encoder_2/tokenizer.json",
        "text_encoder_2/tokenizer_config.json",
        "text_encoder_2/vocab.json",
    }
    assert sum(path.stat().st_size for path in model_base.rglob("*") if path.is_file()) < 12_000_000


def test_weights_fit_the_engine_exactly(model_base):
    """Spec 7: DiT tensors are under "module", VAE tensors at the top level; none is missing or unexpected."""
    dit = HYVideoDiT(DiTConfig(**TOY_DIT))
    dit.load_state_dict(torch.load(model_base / DIT, weights_only=True)["module"])
    config = json.loads((model_base / VAE).with_name("config.json").read_text())
    vae = CausalVAE(parse_vae_config(config))
    vae.load_state_dict(torch.load(model_base / VAE, weights_only=True))
    assert all(torch.isfinite(tensor).all() for model in (dit, vae) for tensor in model.state_dict().values())


def test_equal_seeds_give_equal_bytes(model_base, tmp_path):
    """P3: the weights depend only on the seed, not on the folder or on PyTorch's random state."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = write_toy_checkpoint(tmp_path / "elsewhere" / "deep")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert digests(again) == digests(model_base)


def test_another_seed_changes_every_weight_file(model_base, tmp_path):
    """P3: another seed changes all weights; configs and tokenizers are equal."""
    other = digests(write_toy_checkpoint(tmp_path, seed=1))
    changed = {name for name, digest in digests(model_base).items() if other[name] != digest}
    weights = {DIT, VAE, "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}
    assert changed == weights | {"licence.json"}  # it names the digests of the weights


def test_a_complete_tree_is_not_written_again(model_base, monkeypatch):
    """P2: a second call writes nothing."""
    monkeypatch.setattr("hv_batch.toy.checkpoint._write_tree", lambda *_: 1 / 0)
    assert write_toy_checkpoint(model_base.parent) == model_base
    assert os.listdir(model_base.parent) == [model_base.name]


def test_an_interrupted_write_leaves_no_tree(tmp_path, monkeypatch):
    """P2: a checkpoint exists completely or not at all, and the next call writes it."""
    with monkeypatch.context() as patch:
        patch.setattr("hv_batch.toy.checkpoint._write_clip", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_toy_checkpoint(tmp_path)
    assert os.listdir(tmp_path) == []
    assert (write_toy_checkpoint(tmp_path) / "text_encoder_2").is_dir()


def test_concurrent_writers_leave_one_tree(tmp_path, monkeypatch):
    """P2: if two processes write at once, the tree of the first is kept."""
    from hv_batch.toy import checkpoint

    write_clip = checkpoint._write_clip
    with monkeypatch.context() as patch:

        def overtaken(directory: Path, seed: int) -> None:
            patch.setattr(checkpoint, "_write_clip", write_clip)
            write_toy_checkpoint(tmp_path)
            write_clip(directory, seed)

        patch.setattr(checkpoint, "_write_clip", overtaken)
        base = write_toy_checkpoint(tmp_path)
    assert os.listdir(tmp_path) == [base.name]


@pytest.mark.parametrize("template", [VIDEO_TEMPLATE, IMAGE_TEMPLATE])
def test_templates_are_as_many_tokens_as_with_llama_3(model_base, template):
    """Spec 3.1: the templates have 95 and 36 tokens, including the <|begin_of_text|> of the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_base / "text_encoder")
    ids = tokenizer(template.head).input_ids
    assert len(ids) == template.crop_start
    assert tokenizer.decode(ids) == f"<|begin_of_text|>{template.head}"


def test_plain_prompts_have_about_one_token_per_word(model_base):
    """Token counts are similar to those of the released tokenizer; unknown words are encoded as bytes."""
    tokenizer = AutoTokenizer.from_pretrained(model_base / "text_encoder")
    assert tokenizer.tokenize("A cat walks on the beach, 2 dogs") == [
        "A", "Ġcat", "Ġwalks", "Ġon", "Ġthe", "Ġbeach", ",", "Ġ", "2", "Ġ", *"dogs",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("Übergröße 🎈").input_ids, skip_special_tokens=True) == "Übergröße 🎈"


def test_clip_weights_have_the_released_names(model_base):
    """Spec 7: the tensor names of openai/clip-vit-large-patch14 begin with `text_model.`."""
    assert all(
        name.startswith("text_model.") for name in load_file(model_base / "text_encoder_2" / "model.safetensors")
    )


def test_renders_have_visible_content(model_base):
    """Renders have contrast, colour and motion, and differ by prompt and by seed."""
    engine = HunyuanVideoPipeline.from_pretrained(model_base, device="cpu", dit=TOY_DIT, vae_precision="fp32")

    def render(prompt: str, seed: int) -> np.ndarray:
        size = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 6}
        return engine(prompt, seed=seed, **size).astype(np.float32)

    video = render("A cat walks on the grass", 0)
    assert video.std(axis=(1, 2)).mean() > 25  # flat grey has 0
    assert np.ptp(video, axis=3).mean() > 25  # black and white has 0
    assert np.abs(video[-1] - video[0]).mean() > 10
    assert np.abs(video - render("Fireworks over a calm lake at night", 0)).mean() > 10
    assert np.abs(video - render("A cat walks on the grass", 1)).mean() > 10
