"""Checkpoints into modules: opened, refused with the reason, or loaded whole.

Modules are built on the meta device and their tensors come one at a time out of memory-mapped files
(`hv_batch.engine.checkpoint.tensor_files`). So the host never holds a second copy, a rank on a GPU needs no more of its own host
memory than one tensor, and the ranks of a node read a file from the disk once: what the first has read, the others
find in the page cache. Every tensor of the file must have its place in the module, by name and shape, and the other way
round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hv_batch.architecture import DiTConfig, VAEConfig
from hv_batch.engine.checkpoint import diffusers_layout
from hv_batch.engine.checkpoint.tensor_files import ALIGNMENT, StoredTensor, all_tensors, named_tensors, open_file
from hv_batch.engine.checkpoint.text_files import weight_file
from hv_batch.engine.checkpoint.tree import LAYOUT, CheckpointTree, read_json, scales_file
from hv_batch.engine.dit.fp8_storage import FP8, block_linears, dequantise, hold_in_fp8
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.vae.model import CausalVAE, parse_vae_config
from hv_batch.protocol import UserError

# "none": FP8 weights become weights in the model's dtype when they are loaded; the same numbers, twice the memory.
# "storage": they stay FP8 and are dequantised on every use, as released.
# "matmul": the products of the blocks are FP8 as well, whatever the file holds; see `hv_batch.engine.dit.fp8_matmul`.
FP8_MODES = ("none", "storage", "matmul")

LLAMA_TYPES = ("llama",)  # model_type in the config.json of a text tower
CLIP_TYPES = ("clip", "clip_text_model")

Tensors = dict[str, StoredTensor]

_NAMES_SHOWN = 4  # of mismatching tensors: enough to recognise a wrong width, depth or prefix


def load_dit(
    tree: CheckpointTree,
    config: DiTConfig,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
    fp8: str = "none",
) -> HYVideoDiT:
    """The DiT in `dtype` on `device` with the named attention backend, ready for inference; `fp8` is of FP8_MODES.

    Raises UserError when the file is missing or unreadable, or is not a checkpoint of `config`, or when its FP8 weights
    lack their scales, or `fp8` is "storage" and they are none.
    """
    model, tensors = _plan_dit(tree, config, attention, fp8)
    _fill(model, tensors, dtype, device)
    return model


def load_vae(tree: CheckpointTree, dtype: torch.dtype, device: torch.device) -> CausalVAE:
    """The VAE in `dtype` on `device`, ready for inference; errors as of `load_dit`."""
    model, tensors = _plan_vae(tree)
    _fill(model, tensors, dtype, device)
    return model


def verify(tree: CheckpointTree, config: DiTConfig, fp8: str = "none") -> list[str]:
    """What would stop the model from loading, found without reading tensor data: seconds for any size of model."""
    if missing := tree.missing():
        return [*missing, LAYOUT]
    return [
        *verify_dit(tree, config, fp8),
        *_told_by(
            lambda: _plan_vae(tree),
            lambda: open_tower(tree.text_encoder, LLAMA_TYPES),
            lambda: open_tower(tree.text_encoder_2, CLIP_TYPES),
        ),
    ]


def verify_dit(tree: CheckpointTree, config: DiTConfig, fp8: str = "none") -> list[str]:
    """The same of the DiT alone."""
    return _told_by(lambda: _plan_dit(tree, config, "sdpa", fp8))


def _told_by(*checks: Callable[[], object]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


def open_dit(tree: CheckpointTree) -> Tensors:
    """The DiT's tensors under their released names, as stored, unread."""
    path = tree.dit_file()
    content = _open(path)
    if tree.load_key not in content and not all_tensors(content):
        raise UserError(
            f"{path} has no {tree.load_key!r} (the load_key); its keys are {', '.join(map(repr, content))}. "
            "Set load_key to 'module' or 'ema' where it is one of them, or name the released file."
        )
    tensors = named_tensors(content.get(tree.load_key, content), path)
    return diffusers_layout.released_dit(tensors, path) if diffusers_layout.is_diffusers_dit(tensors) else tensors


def open_scales(path: Path, tensors: Mapping[str, StoredTensor]) -> Tensors:
    """The scale of every FP8 weight among the DiT's `tensors`, by module name; empty when there are none.

    `path` is the file of the tensors; the map lies beside it. Raises UserError when it does not, or lacks a scale.
    """
    weights = [name for name, tensor in tensors.items() if tensor.dtype.itemsize == 1]
    if not weights:
        return {}
    map_path = scales_file(path)
    if not map_path.is_file():
        raise UserError(
            f"{path} holds 8-bit weights (as {weights[0]}), which mean nothing without their scales: these are "
            f"expected in {map_path}, which is not there. Copy the released map there, or name the bf16 file as "
            "dit_weight."
        )
    scales = named_tensors(open_file(map_path), map_path)
    modules = [name.removesuffix(".weight") for name in weights]
    if lacking := [name for name in modules if name not in scales]:
        raise UserError(f"{map_path} lacks the scales of {_told(lacking)}. It is not the map of {path.name}.")
    if wrong := [name for name in modules if scales[name].numel != 1]:
        raise UserError(f"{map_path} should hold one number a module; {_told(wrong)} have more. It is no released map.")
    return {name: scales[name] for name in modules}


def open_vae(tree: CheckpointTree) -> Tensors:
    """The VAE's tensors, from any of the forms they are found in."""
    content = _open(tree.vae_weight)
    content = content.get("state_dict", content)
    # A file of a whole training state holds other modules beside the VAE.
    if isinstance(content, Mapping) and any(name.startswith("vae.") for name in content):
        content = {name.removeprefix("vae."): t for name, t in content.items() if name.startswith("vae.")}
    return named_tensors(content, tree.vae_weight)


def vae_config(tree: CheckpointTree) -> VAEConfig:
    values = read_json(tree.vae_config)
    return parse_vae_config(diffusers_layout.released_vae_config(values) if tree.is_diffusers else values)


def open_tower(folder: Path, model_types: Collection[str]) -> Tensors:
    """The tensors of a text tower, unread; which of them it needs, transformers judges when it loads them.

    Raises UserError when a file is missing or damaged, or config.json names a type of model not in `model_types`.
    """
    config = folder / "config.json"
    if (found := read_json(config).get("model_type")) not in model_types:
        raise UserError(
            f"{config} describes a model of type {found!r}; allowed is {' or '.join(map(repr, model_types))}. "
            + (
                "From a LLaVA checkpoint, take the language model first: `hv-batch weights extract-text-encoder`."
                if model_types == LLAMA_TYPES
                else "Copy openai/clip-vit-large-patch14 there."
            )
        )
    path = weight_file(folder)
    if path is None:
        raise UserError(f"{folder} holds no weights; expected is {folder / 'model.safetensors'}. Copy them there.")
    return named_tensors(open_file(path), path)


def _plan_dit(tree: CheckpointTree, config: DiTConfig, attention: str, fp8: str) -> tuple[HYVideoDiT, Tensors]:
    """The model on the meta device, and what to fill it with."""
    with torch.device("meta"):
        model = HYVideoDiT(config, attention)
    path = tree.dit_file()
    tensors = open_dit(tree)
    _refuse_mismatch(model, tensors, path, "Set the option `dit` to the width and depth of this checkpoint")
    scales = open_scales(path, tensors)
    linears = block_linears(model)
    if strange := [name for name in scales if name not in linears or tensors[f"{name}.weight"].dtype != FP8]:
        raise UserError(
            f"{path} holds 8-bit weights that the release does not: {_told(strange)}. Only the Linears inside the "
            "blocks may be, as float8_e4m3fn. Name the released FP8 file, or the bf16 one."
        )
    if fp8 == "storage" and not scales:
        raise UserError(
            f"fp8: storage was asked for, but {path} holds no FP8 weights. Name the released "
            "mp_rank_00_model_states_fp8.pt as dit_weight, or make some with `hv-batch weights convert --fp8`."
        )
    if fp8 != "none" and scales:
        hold_in_fp8(model, scales)
        return model, tensors | {f"{name}.scale": _as_scalar(scale) for name, scale in scales.items()}
    return model, tensors | {
        f"{name}.weight": _dequantised(tensors[f"{name}.weight"], scale) for name, scale in scales.items()
    }


def _plan_vae(tree: CheckpointTree) -> tuple[CausalVAE, Tensors]:
    config = vae_config(tree)
    with torch.device("meta"):
        model = CausalVAE(config)
    tensors = open_vae(tree)
    _refuse_mismatch(model, tensors, tree.vae_weight, f"Copy the {tree.vae_config.name} beside it that it came with")
    return model, tensors


def _fill(model: nn.Module, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> None:
    """Read the tensors into a model that stands on the meta device; FP8 ones as they are, the others in `dtype`."""
    state = {
        name: _aligned(tensors[name].read(device, FP8 if empty.dtype == FP8 else dtype))
        for name, empty in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False).eval()


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch itself would have put it (P3): matrix kernels of the CPU sum in another order elsewhere.

    Files of torch, and those that `hv-batch weights convert` writes, are aligned; other safetensors seldom are.
    """
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor


def _as_scalar(scale: StoredTensor) -> StoredTensor:
    return replace(scale, shape=(), read=lambda device, dtype: scale.read(device, dtype).reshape(()))


def _dequantised(weight: StoredTensor, scale: StoredTensor) -> StoredTensor:
    def read(device: torch.device, dtype: torch.dtype) -> Tensor:
        return dequantise(weight.read(device, weight.dtype), scale.read(device, dtype).reshape(()), dtype)

    return replace(weight, read=read)


def _open(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is not there. {LAYOUT}")
    return open_file(path)


def _refuse_mismatch(model: nn.Module, tensors: Mapping[str, StoredTensor], path: Path, remedy: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    differences = {
        "missing": [name for name in expected if name not in given],
        "not of this model": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} is {list(given[name])}, should be {list(shape)}"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ],
    }
    told = [f"{len(names)} {what} ({_told(names)})" for what, names in differences.items() if names]
    if told:
        raise UserError(
            f"{path} does not fit the configured model: of its tensors {'; '.join(told)}. {remedy}, or name the right "
            "file."
        )


def _told(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
