"""Names of modules in LoRA files, and the part of the released model that each of them means.

    official, musubi-tuner, kohya   lora_unet_double_blocks_0_img_attn_qkv      dots are underscores
    diffusion-pipe                  transformer.double_blocks.0.img_attn_qkv
    ComfyUI                         diffusion_model.double_blocks.0.img_attn.qkv, or the official names
    diffusers, finetrainers         transformer.transformer_blocks.0.attn.to_q

A module of diffusers may be a part of a fused module of the release: `to_q`, `to_k` and `to_v` are rows of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hv_batch.engine.checkpoint import diffusers_layout
from hv_batch.engine.checkpoint.matching import Shapes

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
FLAT_PREFIX = "lora_unet_"

# Replacements, in this order, in the released names (with a dot at the end) that give those of ComfyUI.
_COMFY = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.", "_attn.norm.query_norm."),
    ("_attn_k_norm.", "_attn.norm.key_norm."),
    (".q_norm.", ".norm.query_norm."),
    (".k_norm.", ".norm.key_norm."),
    ("_attn_proj.", "_attn.proj."),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
)


@dataclass(frozen=True, slots=True)
class ModulePart:
    """Rows [start, stop) of the weight, and of the bias, of a module of the released model."""

    module: str
    start: int
    stop: int
    has_swapped_halves: bool = False  # the file stores the second half of the rows first


class ModuleNames:
    """Finds the part of a model that a LoRA file names. `shapes` are the model's tensors."""

    def __init__(self, shapes: Shapes) -> None:
        self._parts = dict(_all_names(shapes))
        # Underscores could make two names equal; such a name is left out, so that it is refused instead of guessed.
        flat: dict[str, ModulePart | None] = {}
        for name, part in self._parts.items():
            key = name.replace(".", "_")
            flat[key] = part if flat.get(key, part) == part else None
        self._flat = {name: part for name, part in flat.items() if part}

    def find(self, name: str) -> ModulePart | None:
        """Return the part that `name` (a key of a file without its suffix) means, or None if the model has none."""
        if name.startswith(FLAT_PREFIX):
            return self._flat.get(name.removeprefix(FLAT_PREFIX))
        return self._parts.get(plain_name(name))


def plain_name(name: str) -> str:
    """Return the name of a module without the prefixes that programs put before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _all_names(shapes: Shapes) -> Iterator[tuple[str, ModulePart]]:
    for tensor, shape in shapes.items():
        module, _, parameter = tensor.rpartition(".")
        if parameter != "weight":
            continue
        whole = ModulePart(module, 0, shape[0])
        yield module, whole
        yield _comfy_name(module), whole
        yield from _diffusers_names(module, shape)


def _comfy_name(module: str) -> str:
    name = f"{module}."
    for ours, theirs in _COMFY:
        name = name.replace(ours, theirs)
    return name.removesuffix(".")


def _diffusers_names(module: str, shape: tuple[int, ...]) -> Iterator[tuple[str, ModulePart]]:
    """Fused modules: q, k and v have as many rows as the input has columns, and the last part has the other rows."""
    parts = diffusers_layout.module_parts(module)
    for number, theirs in enumerate(parts):
        if len(parts) == 1:
            yield theirs, ModulePart(module, 0, shape[0], diffusers_layout.has_swapped_halves(theirs))
        else:
            stop = shape[0] if number == len(parts) - 1 else (number + 1) * shape[1]
            yield theirs, ModulePart(module, number * shape[1], stop)


# Kinds of adapters that are not supported: the beginning or a part of a key, and their name.
UNSUPPORTED: Mapping[str, str] = {
    ".hada_w": "LoHa",
    ".lokr_w": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_mid": "LoCon with a middle layer",
    ".oft_": "OFT",
    ".a1.weight": "GLoRA",
    ".w_norm": "LyCORIS norms",
    "lora_transformer_": "OneTrainer",
    "bundle_emb": "OneTrainer",
    ".linear1.0.": "OneTrainer (OMI)",
    "lora_te": "text encoder LoRA",
    "text_encoder": "text encoder LoRA",
}


def unsupported_kind(key: str) -> str | None:
    """Return the name of the kind of adapter that the key belongs to, if that is known and not supported."""
    return next((kind for mark, kind in UNSUPPORTED.items() if mark in key), None)
