"""Toy checkpoints: the real architecture at toy width, as a tree laid out like the released one (spec 7).

This one is not trained: `hv_batch.toy.random_weights` says where its weights come from and what their pictures show.
What is trained of another is in `hv_batch.toy.trained`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from hv_batch.architecture import DIT_CLASS, DiTConfig, VAEConfig
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.vae.model import CausalVAE
from hv_batch.protocol import LATENT_CHANNELS
from hv_batch.toy import random_weights, tokenizers
from hv_batch.toy.random_weights import State, dit_state, text_state, vae_state

LLAMA_WIDTH = 64
CLIP_WIDTH = 32

# Eight heads, so that a group of eight ranks can share them out as it does the released model's 24. Half of each head
# turns with time: frames are few, and should differ.
TOY_DIT: dict[str, Any] = {
    "hidden_size": 128,
    "heads_num": 8,
    "rope_dim_list": (8, 4, 4),
    "mm_double_blocks_depth": 2,
    "mm_single_blocks_depth": 2,
    "text_states_dim": LLAMA_WIDTH,
    "text_states_dim_2": CLIP_WIDTH,
}
TOY_VAE: dict[str, Any] = {
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
}


def cache_dir() -> Path:
    """Where commands keep the tree that they render with."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hv_batch"


def write_toy_checkpoint(root: Path, seed: int = 0) -> Path:
    """The model base of the toy checkpoint under `root`, written first if it is not there yet.

    Its directory is named by the seed and a digest of this recipe, so that a tree of another version is never taken
    for this one.
    """
    return written_once(root / f"toy-{seed}-{_recipe()}", lambda draft: _write_tree(draft, seed))


def written_once(model_base: Path, write: Callable[[Path], None]) -> Path:
    """`model_base`, which `write` fills if it is not there yet.

    It appears whole or not at all: written beside and renamed, and a second writer's copy is dropped.
    """
    if model_base.is_dir():
        return model_base
    root = model_base.parent
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".toy-", dir=root))
    try:
        write(draft)
        draft.chmod(0o755)  # mkdtemp's is private to the user; a checkpoint is shared
        draft.rename(model_base)
    except OSError:
        if not model_base.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return model_base


def _recipe() -> str:
    sources = (Path(__file__), *(Path(str(module.__file__)) for module in (tokenizers, random_weights)))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]


def _write_tree(base: Path, seed: int) -> None:
    with torch.device("meta"):
        dit, vae = HYVideoDiT(DiTConfig(**TOY_DIT)), CausalVAE(VAEConfig(**TOY_VAE))
    write_dit(base, TOY_DIT, {name: tensor.bfloat16() for name, tensor in dit_state(dit, seed).items()})
    write_vae(base, TOY_VAE, vae_state(vae, seed))
    _write_llama(base / "text_encoder", seed)
    _write_clip(base / "text_encoder_2", seed)


def write_dit(base: Path, config: Mapping[str, Any], state: State) -> None:
    """The DiT's part of the tree at `base`; `config` are fields of `DiTConfig`, `state` has released names."""
    file = dit_file(base)
    file.parent.mkdir(parents=True, exist_ok=True)
    # torch.save writes the file's stem into the archive: the final names, from the start, keep the bytes equal.
    torch.save({"module": state}, file)
    # The released tree has none: the width of the released model is known. With it, the toy loads without options.
    _write_json(file.with_name("config.json"), {"_class_name": DIT_CLASS} | dict(config))


def write_vae(base: Path, config: Mapping[str, Any], state: State) -> None:
    """The VAE's part of the tree at `base`; `config` are fields of `VAEConfig`, `state` has released names."""
    file = vae_file(base)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    told = {"_class_name": "AutoencoderKLCausal3D", "latent_channels": LATENT_CHANNELS}
    _write_json(file.with_name("config.json"), told | dict(config))


def dit_file(base: Path) -> Path:
    return base / "hunyuan-video-t2v-720p" / "transformers" / "mp_rank_00_model_states.pt"


def vae_file(base: Path) -> Path:
    return base / "hunyuan-video-t2v-720p" / "vae" / "pytorch_model.pt"


def _write_llama(directory: Path, seed: int) -> None:
    from transformers import LlamaModel

    config = llama_config(tokenizers.write_llama_tokenizer(directory), LLAMA_WIDTH)
    with torch.device("meta"):
        model = LlamaModel(config)
    write_tower(directory, config, text_state(model, seed))


def llama_config(vocab_size: int, width: int) -> Any:
    """Of the LLaMA tower: transformers' LlamaConfig."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,  # of which the engine runs two
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped, as in Llama 3
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        architectures=["LlamaModel"],
    )


def _write_clip(directory: Path, seed: int) -> None:
    from transformers import CLIPTextModel

    config = clip_config(*tokenizers.write_clip_tokenizer(directory), CLIP_WIDTH)
    with torch.device("meta"):
        model = CLIPTextModel(config)
    write_tower(directory, config, clip_names(text_state(model, seed)))


def clip_config(vocab_size: int, start: int, end: int, width: int) -> Any:
    """Of the CLIP tower: transformers' CLIPTextConfig. `start` and `end` are ids of tokens."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=start,
        eos_token_id=end,  # the model pools at this token's position
        pad_token_id=end,
        architectures=["CLIPTextModel"],
    )


def clip_names(state: State) -> State:
    """The released file's names start with "text_model."; some versions of transformers leave that out."""
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def write_tower(directory: Path, config: Any, state: State) -> None:
    """config.json and model.safetensors of a text tower, as transformers reads them."""
    _write_json(directory / "config.json", config.to_diff_dict())
    # Not save_file, which makes the file private to its writer.
    (directory / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
