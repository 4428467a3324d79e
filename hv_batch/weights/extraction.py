"""The LLaMA tower out of LLaVA (`xtuner/llava-llama-3-8b-v1_1-transformers`): its language model and its tokenizer.

The release has a script for this step, which loads the whole of LLaVA; here tensors go from file to file, one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hv_batch.engine.checkpoint.loading import LLAMA_TYPES, Tensors
from hv_batch.engine.checkpoint.tensor_files import named_tensors, open_file
from hv_batch.engine.checkpoint.text_files import weight_file
from hv_batch.engine.checkpoint.tree import read_json
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

# LLaVA's names of the language model's tensors, as transformers writes them below 4.52 and from it on; and what is left
# of them in a LlamaForCausalLM.
_NAMES = (
    (re.compile(r"language_model\.((?:model|lm_head)\..+)"), "{}"),
    (re.compile(r"model\.language_model\.(.+)"), "model.{}"),
    (re.compile(r"(lm_head\..+)"), "{}"),
)
_SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def extract_text_encoder(llava: Path, target: Path, on_bytes: OnBytes = ignore_bytes) -> None:
    """Write the language model of the LLaVA folder, its config and its tokenizer into `target`, in their own dtype.

    Running it again after an interruption goes on where it was. Raises UserError when `llava` is no LLaVA with a LLaMA
    inside, or is incomplete or damaged.
    """
    tensors = language_model(llava)
    config = _llama_config(read_json(llava / "config.json"), llava / "config.json", tensors)
    tokenizer = [llava / name for name in TOKENIZER_FILES if (llava / name).is_file()]
    if llava / "tokenizer.json" not in tokenizer:
        raise UserError(f"{llava / 'tokenizer.json'} is not there. Copy the tokenizer's files of that model as well.")
    target.mkdir(parents=True, exist_ok=True)
    for path in tokenizer:
        link_or_copy(path, target / path.name)
    write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
    weights = weight_file(llava)
    assert weights is not None
    write_sharded(target, "model", tensors, files_origin(weights, "language model"), on_bytes)


def language_model(llava: Path) -> Tensors:
    """The tensors of the language model, unread, under the names of a LlamaForCausalLM. Errors as above."""
    path = weight_file(llava)
    if not llava.is_dir() or path is None:
        raise UserError(
            f"{llava} holds no LLaVA weights; expected are config.json, model.safetensors or its shards with their "
            "index, and the tokenizer's files. Download xtuner/llava-llama-3-8b-v1_1-transformers there."
        )
    tensors = {}
    for name, tensor in named_tensors(open_file(path), path).items():
        if ours := _llama_name(name):
            tensors[ours] = tensor
    if "model.embed_tokens.weight" not in tensors:
        raise UserError(f"{path} holds no language model of a LLaVA checkpoint. Name the folder of a whole LLaVA.")
    return tensors


def _llama_name(name: str) -> str | None:
    found = ((pattern.fullmatch(name), form) for pattern, form in _NAMES)
    return next((form.format(match[1]) for match, form in found if match), None)


def _llama_config(llava: dict[str, Any], path: Path, tensors: Collection[str]) -> dict[str, Any]:
    """LLaVA's text_config, made complete: it leaves out what equals the defaults of its library's LLaMA."""
    from transformers import LlamaConfig  # takes seconds to import

    given = llava.get("text_config")
    if not isinstance(given, dict) or given.get("model_type") not in LLAMA_TYPES:
        raise UserError(
            f"{path} describes no LLaVA with a LLaMA inside. Name that of llava-llama-3-8b-v1_1-transformers."
        )
    defaults = LlamaConfig(**given)
    complete = {key: getattr(defaults, key) for key in _SHAPE_KEYS}
    layers = complete["num_hidden_layers"]
    if f"model.layers.{layers - 1}.input_layernorm.weight" not in tensors:
        raise UserError(f"{path} says {layers} layers, which the weights beside it do not hold. Copy the files again.")
    return {**complete, **given, "architectures": ["LlamaForCausalLM"]}
