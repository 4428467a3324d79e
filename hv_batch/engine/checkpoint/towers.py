"""Check the text encoders (towers) from headers alone: config.json, tensors, tokenizer, and the DiT that reads them.

The shapes follow from config.json as they do in transformers, whose defaults apply to fields that the file omits.
transformers itself checks them only when it loads the weights, on the first GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hv_batch.architecture import CLIP_TOKENS, SKIPPED_LAYERS, check_fields
from hv_batch.engine.checkpoint.json_files import COPY_AGAIN, read_json
from hv_batch.engine.checkpoint.matching import check_tensors
from hv_batch.engine.checkpoint.tensor_files import Tensors, named_tensors, open_file
from hv_batch.engine.checkpoint.text_files import weight_file
from hv_batch.protocol import UserError

LLAMA_TYPES = ("llama",)  # allowed model_type in the config.json of a text encoder
CLIP_TYPES = ("clip", "clip_text_model")

_REMEDY = "Copy config.json and the weights of the same model to this folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaFields:
    """Fields of the config.json of LLaMA that determine its tensors, with the defaults of transformers."""

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFields:
    """Fields of the config.json of CLIP's text tower that determine its tensors, with the defaults of transformers."""

    vocab_size: int = 49_408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77


def check_llama(folder: Path, tokenizer: Path, width: int | None, dit: Path) -> None:
    """Check the LLaMA tower in `folder` for a DiT, in the file `dit`, that reads states of `width` channels, if known.

    Raises UserError if the tower cannot be loaded, if its files do not belong together, or if the DiT needs another.
    """
    path = folder / "config.json"
    tensors = open_tower(folder, LLAMA_TYPES)
    config = _read_fields(LlamaFields, read_json(path), path)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // heads
    if heads % kv_heads or (config.head_dim is None and config.hidden_size % heads):
        raise UserError(
            f"{path}: hidden_size {config.hidden_size}, num_attention_heads {heads} and num_key_value_heads {kv_heads} "
            f"must each be a multiple of the next. {COPY_AGAIN}"
        )
    if config.num_hidden_layers <= SKIPPED_LAYERS:
        raise UserError(
            f"{path}: num_hidden_layers is {config.num_hidden_layers}, allowed is at least {SKIPPED_LAYERS + 1}: the "
            f"states are those before the last {SKIPPED_LAYERS} layers. {COPY_AGAIN}"
        )
    _check_width(path, config.hidden_size, "text_states_dim", width, dit)
    shapes = dict(_llama_shapes(config, heads * head_dim, kv_heads * head_dim))
    _check_tower_tensors(folder, shapes, tensors, "model.", "layers.", config.num_hidden_layers)
    _check_vocabulary(tokenizer, config.vocab_size, path)


def check_clip(folder: Path, tokenizer: Path, width: int | None, dit: Path) -> None:
    """Same as `check_llama`, for the CLIP tower and the pooled vector of `width` channels."""
    path = folder / "config.json"
    tensors = open_tower(folder, CLIP_TYPES)
    config = _read_fields(ClipFields, text_config(read_json(path), path), path)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{path}: hidden_size {config.hidden_size} must be a multiple of num_attention_heads "
            f"{config.num_attention_heads}. {COPY_AGAIN}"
        )
    if config.max_position_embeddings < CLIP_TOKENS:
        raise UserError(
            f"{path}: max_position_embeddings is {config.max_position_embeddings}, allowed is at least {CLIP_TOKENS}, "
            f"the length of an encoded prompt. {COPY_AGAIN}"
        )
    _check_width(path, config.hidden_size, "text_states_dim_2", width, dit)
    shapes = dict(_clip_shapes(config))
    _check_tower_tensors(folder, shapes, tensors, "text_model.", "encoder.layers.", config.num_hidden_layers)
    _check_vocabulary(tokenizer, config.vocab_size, path)


def open_tower(folder: Path, model_types: Collection[str]) -> Tensors:
    """Return the tensors of a text encoder, unread.

    Raises UserError if a file is missing or damaged, or if the model_type of config.json is not in `model_types`.
    """
    config = folder / "config.json"
    if (model_type := read_json(config).get("model_type")) not in model_types:
        raise UserError(
            f"{config} describes a model of type {model_type!r}; allowed is {' or '.join(map(repr, model_types))}. "
            + (
                "From a LLaVA checkpoint, extract the language model first: `hv-batch weights extract-text-encoder`."
                if model_types == LLAMA_TYPES
                else "Copy openai/clip-vit-large-patch14 to this folder."
            )
        )
    path = weight_file(folder)
    if path is None:
        raise UserError(f"{folder} contains no weights. Copy them to {folder / 'model.safetensors'}.")
    return named_tensors(open_file(path), path)


def text_config(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the config of CLIP's text tower; a config of the whole of CLIP nests it. Raises UserError if it cannot."""
    nested = config.get("text_config")
    if nested is None:
        return config
    if not isinstance(nested, Mapping):
        raise UserError(f"{path}: text_config must be an object but is a {type(nested).__name__}. {COPY_AGAIN}")
    return nested


def _read_fields(kind: Callable[..., Any], values: Mapping[str, Any], path: Path) -> Any:
    # The ignored errors: `kind` is a dataclass, which a type variable cannot express.
    known = {field.name: values[field.name] for field in fields(kind) if field.name in values}  # type: ignore[arg-type]
    check_fields(kind, known, str(path))  # type: ignore[arg-type]
    return kind(**known)


def _check_width(path: Path, width: int, field: str, needed: int | None, dit: Path) -> None:
    if needed is not None and width != needed:
        raise UserError(
            f"{path}: hidden_size is {width}, but the DiT {dit} has {field} {needed}, so it cannot read the states of "
            "this text encoder. Copy the text encoder that the DiT was trained with to this folder, or set dit_weight "
            "to the DiT that belongs to it."
        )


def _check_tower_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors, prefix: str, layers: str, depth: int
) -> None:
    """Compare the loaded tensors with their shapes. The file may hold more: skipped layers, heads, another tower.

    `prefix` precedes the names unless the file holds the bare tower. More layers than config.json has (`depth`) are
    refused: transformers would ignore them, and the states would be those of another layer.
    """
    path = weight_file(folder)
    assert path is not None
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    check_tensors(shapes, own, path, _REMEDY, may_have_others=True)
    numbers = {name.removeprefix(layers).partition(".")[0] for name in own if name.startswith(layers)}
    if more := [number for number in numbers if number.isdecimal() and int(number[:9]) >= depth]:
        raise UserError(
            f"{path} contains {len(more)} layer(s) more than {folder / 'config.json'} has (num_hidden_layers {depth}). "
            f"{_REMEDY}."
        )


def _llama_shapes(config: LlamaFields, queries: int, keys: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of each tensor that is loaded. `queries` and `keys` are widths over all heads."""
    width, inner = config.hidden_size, config.intermediate_size
    yield "embed_tokens.weight", (config.vocab_size, width)
    linears = {
        "self_attn.q_proj": (queries, width, config.attention_bias),
        "self_attn.k_proj": (keys, width, config.attention_bias),
        "self_attn.v_proj": (keys, width, config.attention_bias),
        "self_attn.o_proj": (width, queries, config.attention_bias),
        "mlp.gate_proj": (inner, width, config.mlp_bias),
        "mlp.up_proj": (inner, width, config.mlp_bias),
        "mlp.down_proj": (width, inner, config.mlp_bias),
    }
    for layer in range(config.num_hidden_layers - SKIPPED_LAYERS):
        yield f"layers.{layer}.input_layernorm.weight", (width,)
        yield f"layers.{layer}.post_attention_layernorm.weight", (width,)
        for name, (outs, ins, has_bias) in linears.items():
            yield f"layers.{layer}.{name}.weight", (outs, ins)
            if has_bias:
                yield f"layers.{layer}.{name}.bias", (outs,)


def _clip_shapes(config: ClipFields) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of each tensor that is loaded."""
    width, inner = config.hidden_size, config.intermediate_size
    yield "embeddings.token_embedding.weight", (config.vocab_size, width)
    yield "embeddings.position_embedding.weight", (config.max_position_embeddings, width)
    linears = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    norms = [f"encoder.layers.{n}.layer_norm{i}" for n in range(config.num_hidden_layers) for i in (1, 2)]
    for norm in (*norms, "final_layer_norm"):
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)
    for layer in range(config.num_hidden_layers):
        for name, shape in linears.items():
            yield f"encoder.layers.{layer}.{name}.weight", shape
            yield f"encoder.layers.{layer}.{name}.bias", shape[:1]


def _check_vocabulary(folder: Path, size: int, config: Path) -> None:
    """Raise UserError if the tokenizer in `folder` has a token that the tower has no embedding for."""
    path = folder / "tokenizer.json"
    try:
        largest = _largest_id(
            read_json(path) if path.is_file() else {"model": {"vocab": read_json(folder / "vocab.json")}}
        )
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or not a tokenizer ({type(error).__name__}: {error}). {COPY_AGAIN}"
        ) from error
    if largest >= size:
        raise UserError(
            f"{path} has a token with the number {largest}, but {config} has vocab_size {size}, so the text encoder "
            "has no embedding for it. Copy the tokenizer of the same model to this folder."
        )


def _largest_id(tokenizer: Mapping[str, Any]) -> int:
    vocabulary = tokenizer["model"]["vocab"]
    numbers = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else [len(vocabulary) - 1]
    numbers += [token["id"] for token in tokenizer.get("added_tokens") or []]
    if not all(type(number) is int for number in numbers):
        raise TypeError("its tokens must have whole numbers")
    return max(numbers)
