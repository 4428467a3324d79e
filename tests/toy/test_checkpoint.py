"""The toy checkpoint: laid out as the released one, the same bytes each time, and worth looking at (spec section 7)."""

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
    """Spec 7: the files that a loader of the released checkpoint looks for, and beside them the DiT's width alone."""
    assert set(digests(model_base)) == {
        DIT,
        DIT_CONFIG,
        VAE,
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
    """Spec 7: {"module": ...} for the DiT, bare names for the VAE; every tensor has its place and none is missing."""
    dit = HYVideoDiT(DiTConfig(**TOY_DIT))
    dit.load_state_dict(torch.load(model_base / DIT, weights_only=True)["module"])
    config = json.loads((model_base / VAE).with_name("config.json").read_text())
    vae = CausalVAE(parse_vae_config(config))
    vae.load_state_dict(torch.load(model_base / VAE, weights_only=True))
    assert all(torch.isfinite(tensor).all() for model in (dit, vae) for tensor in model.state_dict().values())


def test_one_seed_one_set_of_bytes(model_base, tmp_path):
    """P3: the weights revision of the toy is a function of its seed, wherever it is written."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = write_toy_checkpoint(tmp_path / "elsewhere" / "deep")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert digests(again) == digests(model_base)


def test_another_seed_changes_every_weight_file(model_base, tmp_path):
    """P3: another seed is another model; configs and tokenizers stay."""
    other = digests(write_toy_checkpoint(tmp_path, seed=1))
    changed = {name for name, digest in digests(model_base).items() if other[name] != digest}
    assert changed == {DIT, VAE, "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}


def test_a_complete_tree_is_left_alone(model_base, monkeypatch):
    """P2: the second call writes nothing."""
    monkeypatch.setattr("hv_batch.toy.checkpoint._write_tree", lambda *_: 1 / 0)
    assert write_toy_checkpoint(model_base.parent) == model_base
    assert os.listdir(model_base.parent) == [model_base.name]


def test_a_writer_that_dies_leaves_no_tree(tmp_path, monkeypatch):
    """P2: a checkpoint is there whole or not at all, and the next call writes it."""
    with monkeypatch.context() as patch:
        patch.setattr("hv_batch.toy.checkpoint._write_clip", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_toy_checkpoint(tmp_path)
    assert os.listdir(tmp_path) == []
    assert (write_toy_checkpoint(tmp_path) / "text_encoder_2").is_dir()


def test_a_second_writer_yields_to_the_first(tmp_path, monkeypatch):
    """P2: two processes that write at once end with one tree."""
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
    """Spec 3.1: 95 and 36 tokens, the tokenizer's own <|begin_of_text|> included."""
    tokenizer = AutoTokenizer.from_pretrained(model_base / "text_encoder")
    ids = tokenizer(template.head).input_ids
    assert len(ids) == template.crop_start
    assert tokenizer.decode(ids) == f"<|begin_of_text|>{template.head}"


def test_plain_prompts_are_about_one_token_a_word(model_base):
    """The toy spends its 256 tokens as the released tokenizer would, and spells out what it does not know."""
    tokenizer = AutoTokenizer.from_pretrained(model_base / "text_encoder")
    assert tokenizer.tokenize("A cat walks on the beach, 2 dogs") == [
        "A", "Ġcat", "Ġwalks", "Ġon", "Ġthe", "Ġbeach", ",", "Ġ", "2", "Ġ", *"dogs",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("Übergröße 🎈").input_ids, skip_special_tokens=True) == "Übergröße 🎈"


def test_clip_weights_carry_the_released_names(model_base):
    """Spec 7: openai/clip-vit-large-patch14 names its text tower `text_model`."""
    assert all(
        name.startswith("text_model.") for name in load_file(model_base / "text_encoder_2" / "model.safetensors")
    )


def test_renders_are_worth_looking_at(model_base):
    """The demo's pictures: contrast, colour, motion, and another picture for another prompt or seed."""
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
