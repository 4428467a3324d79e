"""Extract the LLaMA tower, with its tokenizer, from LLaVA (`xtuner/llava-llama-3-8b-v1_1-transformers`).

The script of the release for this step loads the whole LLaVA. This module copies one tensor at a time from file to
file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hv_batch.architecture import check_fields
from hv_batch.engine.checkpoint.json_files import read_json
from hv_batch.engine.checkpoint.tensor_files import Tensors, named_tensors, open_file
from hv_batch.engine.checkpoint.text_files import weight_file
from hv_batch.engine.checkpoint.towers import LLAMA_TYPES, LlamaFields
from hv_batch.protocol import UserError
from hv_batch.weights.conversion import files_origin, link_or_copy
from hv_batch.weights.shards import OnBytes, ignore_bytes, write_sharded, write_text

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)

# Tensor names of the language model in LLaVA, as written by transformers before and since version 4.52, and the
# corresponding names in a LlamaForCausalLM.
_NAMES = (
    (re.compile(r"language_model\.((?:model|lm_head)\..+)"), "{}"),
    (re.compile(r"model\.language_model\.(.+)"), "model.{}"),
    (re.compile(r"(lm_head\..+)"), "{}"),
)
_SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def extract_text_encoder(llava: Path, target: Path, on_bytes: OnBytes = ignore_bytes) -> None:
    """Write the language model of the folder `llava`, its config and its tokenizer into `target`.

    Tensors keep their dtype. An interrupted extraction resumes when it is run again. Raises UserError if `llava` is not
    a LLaVA checkpoint with a LLaMA language model, or is incomplete or damaged.
    """
    tensors = language_model(llava)
    config = _llama_config(read_json(llava / "config.json"), llava / "config.json", tensors)
    tokenizer = [llava / name for name in TOKENIZER_FILES if (llava / name).is_file()]
    if llava / "tokenizer.json" not in tokenizer:
        raise UserError(f"{llava / 'tokenizer.json'} does not exist. Copy the tokenizer files of that model as well.")
    target.mkdir(parents=True, exist_ok=True)
    for path in tokenizer:
        link_or_copy(path, target / path.name)
    write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
    weights = weight_file(llava)
    assert weights is not None
    write_sharded(target, "model", tensors, files_origin(weights, "language model"), on_bytes)


def language_model(llava: Path) -> Tensors:
    """Return the tensors of the language model, not read yet, under the names of a LlamaForCausalLM.

    Raises UserError if the folder holds no LLaVA weights.
    """
    path = weight_file(llava)
    if not llava.is_dir() or path is None:
        raise UserError(
            f"{llava} holds no LLaVA weights. Expected files: config.json, model.safetensors or its shards with their "
            "index, and the tokenizer files. Download xtuner/llava-llama-3-8b-v1_1-transformers to this folder."
        )
    tensors = {}
    for name, tensor in named_tensors(open_file(path), path).items():
        if ours := _llama_name(name):
            tensors[ours] = tensor
    if "model.embed_tokens.weight" not in tensors:
        raise UserError(f"{path} has no language model of a LLaVA checkpoint. Give the folder of a complete LLaVA.")
    return tensors


def _llama_name(name: str) -> str | None:
    matches = ((pattern.fullmatch(name), form) for pattern, form in _NAMES)
    return next((form.format(match[1]) for match, form in matches if match), None)


def _llama_config(llava: dict[str, Any], path: Path, tensors: Collection[str]) -> dict[str, Any]:
    """Return the text_config of LLaVA with the fields added that it omits because they equal transformers' defaults."""
    from transformers import LlamaConfig  # takes seconds to import

    given = llava.get("text_config")
    if not isinstance(given, dict) or given.get("model_type") not in LLAMA_TYPES:
        raise UserError(
            f"{path} is not the config of a LLaVA with a LLaMA language model. Give the folder of "
            "llava-llama-3-8b-v1_1-transformers."
        )
    check_fields(LlamaFields, given, f"{path}, text_config")
    defaults = LlamaConfig(**given)
    complete = {key: getattr(defaults, key) for key in _SHAPE_KEYS}
    layers = complete["num_hidden_layers"]
    if f"model.layers.{layers - 1}.input_layernorm.weight" not in tensors:
        raise UserError(
            f"{path} has num_hidden_layers {layers}, but the weights in this folder have fewer layers. Copy the files "
            "again."
        )
    return {**complete, **given, "architectures": ["LlamaForCausalLM"]}
