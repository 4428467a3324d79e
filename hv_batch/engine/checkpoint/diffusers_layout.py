"""Translation of the checkpoint layout of diffusers (`hunyuanvideo-community/HunyuanVideo`) to the released layout.

model_base/
  model_index.json
  transformer/        config.json, diffusion_pytorch_model.safetensors (or shards with their index)
  vae/                config.json, diffusion_pytorch_model.safetensors    (tensor names as released)
  text_encoder/, text_encoder_2/    as released, except that the tokenizers are in
  tokenizer/, tokenizer_2/

The DiT has other tensor names, stores the tensors that the release fuses (q, k, v, and the MLP input of a single-stream
block) as parts, and has the halves of the last modulation swapped: (scale, shift). Nothing else differs, so the
translation is exact.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hv_batch.engine.checkpoint.tensor_files import StoredTensor, joined
from hv_batch.protocol import UserError

DIT_CLASS = "HunyuanVideoTransformer3DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"

_FINAL_MODULATION = "norm_out.linear"
_MARK = "x_embedder.proj.weight"  # present in every DiT of this layout and in none of the released layout

_TIME_MLP = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
_VECTOR_MLP = {"linear_1": "in_layer", "linear_2": "out_layer"}

# Modules outside the blocks: name in diffusers -> released name.
_STEM: Mapping[str, str] = {
    "x_embedder.proj": "img_in.proj",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "proj_out": "final_layer.linear",
    _FINAL_MODULATION: "final_layer.adaLN_modulation.1",
    **{f"time_text_embed.timestep_embedder.{theirs}": f"time_in.{ours}" for theirs, ours in _TIME_MLP.items()},
    **{f"time_text_embed.guidance_embedder.{theirs}": f"guidance_in.{ours}" for theirs, ours in _TIME_MLP.items()},
    **{f"time_text_embed.text_embedder.{theirs}": f"vector_in.{ours}" for theirs, ours in _VECTOR_MLP.items()},
    **{
        f"context_embedder.time_text_embed.timestep_embedder.{theirs}": f"txt_in.t_embedder.{ours}"
        for theirs, ours in _TIME_MLP.items()
    },
    **{f"context_embedder.time_text_embed.text_embedder.{name}": f"txt_in.c_embedder.{name}" for name in _TIME_MLP},
}

# Types of blocks: list in diffusers, released list, and the modules of one block. Modules with the same released name
# are concatenated in the order given here.
_BLOCKS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    (
        "transformer_blocks",
        "double_blocks",
        {
            "norm1.linear": "img_mod.linear",
            "norm1_context.linear": "txt_mod.linear",
            "attn.to_q": "img_attn_qkv",
            "attn.to_k": "img_attn_qkv",
            "attn.to_v": "img_attn_qkv",
            "attn.add_q_proj": "txt_attn_qkv",
            "attn.add_k_proj": "txt_attn_qkv",
            "attn.add_v_proj": "txt_attn_qkv",
            "attn.norm_q": "img_attn_q_norm",
            "attn.norm_k": "img_attn_k_norm",
            "attn.norm_added_q": "txt_attn_q_norm",
            "attn.norm_added_k": "txt_attn_k_norm",
            "attn.to_out.0": "img_attn_proj",
            "attn.to_add_out": "txt_attn_proj",
            "ff.net.0.proj": "img_mlp.fc1",
            "ff.net.2": "img_mlp.fc2",
            "ff_context.net.0.proj": "txt_mlp.fc1",
            "ff_context.net.2": "txt_mlp.fc2",
        },
    ),
    (
        "single_transformer_blocks",
        "single_blocks",
        {
            "norm.linear": "modulation.linear",
            "attn.to_q": "linear1",
            "attn.to_k": "linear1",
            "attn.to_v": "linear1",
            "proj_mlp": "linear1",
            "attn.norm_q": "q_norm",
            "attn.norm_k": "k_norm",
            "proj_out": "linear2",
        },
    ),
    (
        "context_embedder.token_refiner.refiner_blocks",
        "txt_in.individual_token_refiner.blocks",
        {
            "norm1": "norm1",
            "norm2": "norm2",
            "attn.to_q": "self_attn_qkv",
            "attn.to_k": "self_attn_qkv",
            "attn.to_v": "self_attn_qkv",
            "attn.to_out.0": "self_attn_proj",
            "ff.net.0.proj": "mlp.fc1",
            "ff.net.2": "mlp.fc2",
            "norm_out.linear": "adaLN_modulation.1",
        },
    ),
)

_DIT_CONFIG: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {  # field of DiTConfig: from transformer/config.json
    "in_channels": lambda c: c["in_channels"],
    "out_channels": lambda c: c["out_channels"],
    "patch_size": lambda c: (c["patch_size_t"], c["patch_size"], c["patch_size"]),
    "hidden_size": lambda c: c["num_attention_heads"] * c["attention_head_dim"],
    "heads_num": lambda c: c["num_attention_heads"],
    "mlp_width_ratio": lambda c: c["mlp_ratio"],
    "mm_double_blocks_depth": lambda c: c["num_layers"],
    "mm_single_blocks_depth": lambda c: c["num_single_layers"],
    "rope_dim_list": lambda c: tuple(c["rope_axes_dim"]),
    "text_states_dim": lambda c: c["text_embed_dim"],
    "text_states_dim_2": lambda c: c["pooled_projection_dim"],
    "guidance_embed": lambda c: c["guidance_embeds"],
    "refiner_depth": lambda c: c["num_refiner_layers"],
}

# Keys of transformer/config.json that change the architecture, and the only supported value of each.
_IMPLEMENTED: Mapping[str, Any] = {
    "_class_name": DIT_CLASS,
    "image_condition_type": None,
    "qk_norm": "rms_norm",
    "rope_theta": 256.0,
}


def is_diffusers_tree(model_base: Path) -> bool:
    return (model_base / "model_index.json").is_file() or (model_base / "transformer" / "config.json").is_file()


def is_diffusers_dit(names: Mapping[str, Any]) -> bool:
    """Return whether the tensor names are those of the DiT in diffusers."""
    return _MARK in names


def released_dit(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """Return the DiT's tensors by their released names, unread. Parts are concatenated and swapped on reading.

    Unknown names are kept, so that strict loading reports them. Raises UserError if a part of a fused tensor is
    missing.
    """
    groups: defaultdict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        ours, part = _translate(name)
        groups[ours][part] = _halves_swapped(tensor) if name.startswith(f"{_FINAL_MODULATION}.") else tensor
    return {name: _fuse(name, parts, path) for name, parts in groups.items()}


def module_parts(module: str) -> list[str]:
    """Return the modules of diffusers that make up a released module of the DiT, in the order of concatenation."""
    for theirs, ours, modules in _BLOCKS:
        if match := re.fullmatch(rf"{re.escape(ours)}\.(\d+)\.(.+)", module):
            return [f"{theirs}.{match[1]}.{name}" for name, released in modules.items() if released == match[2]]
    return [name for name, released in _STEM.items() if released == module]


def has_swapped_halves(module: str) -> bool:
    """Return whether a module of diffusers stores the halves of its rows in the other order."""
    return module == _FINAL_MODULATION


def dit_options(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the fields of `DiTConfig` from the content of transformer/config.json.

    Raises UserError if it describes another model.
    """
    for key, implemented in _IMPLEMENTED.items():
        if (value := config.get(key, implemented)) != implemented:
            raise UserError(
                f"{path}: {key} is {value!r}, but only {implemented!r}, the text-to-video model, is supported. Set "
                "model_base to a tree of that model."
            )
    try:
        return {field: convert(config) for field, convert in _DIT_CONFIG.items()}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a config of this model's transformer ({error!r}). Copy it again.") from error


def released_vae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the content of diffusers' vae/config.json to that of the released file."""
    released = dict(config)
    if "temporal_compression_ratio" in released:
        released["time_compression_ratio"] = released.pop("temporal_compression_ratio")
    for key, theirs, ours in (
        ("down_block_types", "HunyuanVideoDownBlock3D", "DownEncoderBlockCausal3D"),
        ("up_block_types", "HunyuanVideoUpBlock3D", "UpDecoderBlockCausal3D"),
    ):
        if isinstance(released.get(key), list):
            released[key] = [ours if name == theirs else name for name in released[key]]
    return released


def _translate(name: str) -> tuple[str, str]:
    """Return (released tensor name, part of it) for a tensor name of diffusers."""
    module, _, parameter = name.rpartition(".")
    for theirs, ours, modules in _BLOCKS:
        if (match := re.fullmatch(rf"{re.escape(theirs)}\.(\d+)\.(.+)", module)) and match[2] in modules:
            return f"{ours}.{match[1]}.{modules[match[2]]}.{parameter}", match[2]
    return (f"{_STEM[module]}.{parameter}", module) if module in _STEM else (name, module)


def _fuse(name: str, parts: Mapping[str, StoredTensor], path: Path) -> StoredTensor:
    """Concatenate the parts of a released tensor in their order. Raises UserError if one is missing or does not fit."""
    order = _part_order(name) or list(parts)
    if missing := [part for part in order if part not in parts]:
        raise UserError(
            f"{path} does not fit the model: {name} consists of {', '.join(order)}, of which {', '.join(missing)} is "
            "missing. Copy the file again, or set the path of the right file."
        )
    if len(order) == 1:
        return parts[order[0]]
    try:
        return joined([parts[part] for part in order])
    except ValueError as error:
        raise UserError(
            f"{path} does not fit the model: {name} consists of {', '.join(order)}, but their {error}. Copy the file "
            "again, or set the path of the right file."
        ) from error


def _part_order(name: str) -> list[str]:
    """Return the parts of a released tensor in the order of concatenation; empty for a tensor outside the blocks."""
    for _, ours, modules in _BLOCKS:
        if match := re.fullmatch(rf"{re.escape(ours)}\.\d+\.(.+)\.\w+", name):
            return [theirs for theirs, module in modules.items() if module == match[1]]
    return []


def _halves_swapped(tensor: StoredTensor) -> StoredTensor:
    def read(device: torch.device, dtype: torch.dtype) -> Tensor:
        scale, shift = tensor.read(device, dtype).chunk(2)
        return torch.cat((shift, scale))

    return replace(tensor, read=read)
