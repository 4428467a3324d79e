"""Toy checkpoints: the real architecture at toy width, in the layout of the released checkpoint.

The checkpoint of this module is not trained; `hv_batch.toy.random_weights` describes its weights. The trained toy is in
`hv_batch.toy.trained`.
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
from hv_batch.engine.checkpoint.digests import revision
from hv_batch.engine.checkpoint.licence_file import write_licence
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.vae.model import CausalVAE
from hv_batch.sampling_params import LATENT_CHANNELS
from hv_batch.toy import random_weights, tokenizers
from hv_batch.toy.random_weights import State, dit_state, text_state, vae_state

LICENCE = "apache-2.0"

LLAMA_WIDTH = 64
CLIP_WIDTH = 32

# Eight heads, so that a group of eight ranks can split them as it splits the 24 heads of the released model. Half of
# each head encodes time: there are few frames, and they should differ.
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
    """Return the folder in which commands cache the toy checkpoints."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hv_batch"


def write_toy_checkpoint(root: Path, seed: int = 0) -> Path:
    """Return the model base of the toy checkpoint under `root`, and write it first if it does not exist.

    The name of its folder has the seed and a digest of the sources that define it, so a tree of another version of the
    package is never used.
    """
    return write_once(root / f"toy-{seed}-{_recipe()}", lambda draft: _write_tree(draft, seed))


def write_once(model_base: Path, write: Callable[[Path], None]) -> Path:
    """Return `model_base`, and call `write` to fill it first if it does not exist.

    The folder appears complete or not at all: `write` fills a temporary folder, which is then renamed. If two processes
    write at once, the copy of the second one is deleted.
    """
    if model_base.is_dir():
        return model_base
    root = model_base.parent
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".toy-", dir=root))
    try:
        write(draft)
        draft.chmod(0o755)  # mkdtemp makes the folder private to the user, but a checkpoint is shared
        draft.rename(model_base)
    except OSError:
        if not model_base.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return model_base


def declare_licence(model_base: Path) -> None:
    """Declare in the tree that its weights, which this project has made, are under the licence of its code."""
    write_licence(model_base, LICENCE, revision(CheckpointTree(model_base)))


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
    declare_licence(base)


def write_dit(base: Path, config: Mapping[str, Any], state: State) -> None:
    """Write the DiT of the tree at `base`. `config` has fields of `DiTConfig`; `state` has the released names."""
    file = dit_file(base)
    file.parent.mkdir(parents=True, exist_ok=True)
    # torch.save stores the stem of the file name in the archive. The file must have its final name from the start, so
    # that its bytes do not vary.
    torch.save({"module": state}, file)
    # The released tree has no such file, because the released width is the default. With it, the toy loads without
    # options.
    _write_json(file.with_name("config.json"), {"_class_name": DIT_CLASS} | dict(config))


def write_vae(base: Path, config: Mapping[str, Any], state: State) -> None:
    """Write the VAE of the tree at `base`. `config` has fields of `VAEConfig`; `state` has the released names."""
    file = vae_file(base)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    fixed = {"_class_name": "AutoencoderKLCausal3D", "latent_channels": LATENT_CHANNELS}
    _write_json(file.with_name("config.json"), fixed | dict(config))


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
    """Return the LlamaConfig (of transformers) of the LLaMA tower."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,  # the engine skips the last two
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
    """Return the CLIPTextConfig (of transformers) of the CLIP tower. `start` and `end` are token ids."""
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
    """Add the prefix "text_model." of the released file, which some versions of transformers omit."""
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def write_tower(directory: Path, config: Any, state: State) -> None:
    """Write config.json and model.safetensors of a text tower in the format of transformers."""
    _write_json(directory / "config.json", config.to_diff_dict())
    # save_file would make the file private to the user.
    (directory / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
