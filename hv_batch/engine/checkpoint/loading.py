"""Loading of checkpoints into modules, with validation.

Modules are built on the meta device, and their tensors are read one by one from memory-mapped files
(`hv_batch.engine.checkpoint.tensor_files`). The host therefore never holds a second copy of the model, a rank on a GPU
needs private host memory for one tensor only, and the ranks of a node read a file from disk once, because they share
the page cache. The tensors of the file and of the module must match one to one, by name and shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hv_batch.architecture import DiTConfig, VAEConfig
from hv_batch.engine.checkpoint import diffusers_layout
from hv_batch.engine.checkpoint.json_files import read_json
from hv_batch.engine.checkpoint.matching import PLAIN_DTYPES, check_tensors, shortened
from hv_batch.engine.checkpoint.tensor_files import (
    ALIGNMENT,
    CPU,
    StoredTensor,
    Tensors,
    all_tensors,
    named_tensors,
    open_file,
)
from hv_batch.engine.checkpoint.towers import check_clip, check_llama
from hv_batch.engine.checkpoint.tree import LAYOUT, CheckpointTree, scales_file
from hv_batch.engine.dit.fp8_storage import FP8, block_linears, dequantise, hold_in_fp8
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.vae.model import CausalVAE, parse_vae_config
from hv_batch.protocol import UserError
from hv_batch.sampling_params import LATENT_CHANNELS, SIZE_MULTIPLE, SPATIAL_COMPRESSION

# "none": FP8 weights are dequantised to the model's dtype at load time; same values, twice the memory.
# "storage": they stay FP8 and are dequantised on every use, as in the release.
# "matmul": the blocks also compute their products in FP8, from any weights; see `hv_batch.engine.dit.fp8_matmul`.
FP8_MODES = ("none", "storage", "matmul")


def load_dit(
    tree: CheckpointTree,
    config: DiTConfig,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
    fp8: str = "none",
) -> HYVideoDiT:
    """Load the DiT in `dtype` on `device` with the named attention kernel, ready for inference.

    `fp8` is one of FP8_MODES. Raises UserError if the file is missing, is unreadable or does not fit `config`, if FP8
    weights lack their scales, or if `fp8` is "storage" and the file contains no FP8 weights.
    """
    return load_dit_and_tensors(tree, config, attention, dtype, device, fp8)[0]


def load_dit_and_tensors(
    tree: CheckpointTree,
    config: DiTConfig,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
    fp8: str = "none",
) -> tuple[HYVideoDiT, Tensors]:
    """Same as `load_dit`; also returns the tensors of the checkpoint, unread, by the names of the model's tensors."""
    model, tensors = _plan_dit(tree, config, attention, fp8)
    _fill(model, tensors, dtype, device)
    return model, tensors


def dit_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the DiT's tensors by their released names."""
    with torch.device("meta"):
        return _shapes(HYVideoDiT(config, "sdpa"))


def load_vae(tree: CheckpointTree, dtype: torch.dtype, device: torch.device) -> CausalVAE:
    """Load the VAE in `dtype` on `device`, ready for inference.

    Raises UserError if a file is missing, is unreadable or does not fit its config.
    """
    model, tensors = _plan_vae(tree)
    _fill(model, tensors, dtype, device)
    return model


def verify(tree: CheckpointTree, config: DiTConfig, fp8: str = "none") -> list[str]:
    """Return one sentence for each problem that prevents loading; empty if there is none.

    Does not read tensor data, so it takes seconds for a model of any size.
    """
    if missing := tree.missing():
        return [*missing, LAYOUT]
    problems, dit = verify_dit(tree, config, fp8), tree.dit_file()
    # If the config is not that of the DiT, its widths say nothing about the towers.
    widths = (None, None) if problems else (config.text_states_dim, config.text_states_dim_2)
    return problems + _user_errors(
        lambda: _plan_vae(tree),
        lambda: check_llama(tree.text_encoder, tree.tokenizer, widths[0], dit),
        lambda: check_clip(tree.text_encoder_2, tree.tokenizer_2, widths[1], dit),
    )


def verify_dit(tree: CheckpointTree, config: DiTConfig, fp8: str = "none") -> list[str]:
    """Same as `verify`, for the DiT only."""
    return _user_errors(lambda: _check_latents(tree, config), lambda: _plan_dit(tree, config, "sdpa", fp8))


def _user_errors(*checks: Callable[[], object]) -> list[str]:
    messages = []
    for check in checks:
        try:
            check()
        except UserError as error:
            messages.append(str(error))
    return messages


def open_dit(tree: CheckpointTree) -> Tensors:
    """Return the DiT's tensors by their released names, unread. Raises UserError if the file cannot be used."""
    path = tree.dit_file()
    content = _open(path)
    if tree.load_key not in content and not all_tensors(content):
        raise UserError(
            f"{path} has no {tree.load_key!r} (the load_key); its keys are {shortened(list(map(repr, content)))}. "
            "Set load_key to 'module' or 'ema' if the file has it, or set dit_weight to the released file."
        )
    tensors = named_tensors(content.get(tree.load_key, content), path)
    return diffusers_layout.released_dit(tensors, path) if diffusers_layout.is_diffusers_dit(tensors) else tensors


def open_scales(path: Path, tensors: Mapping[str, StoredTensor]) -> Tensors:
    """Return the scale of every FP8 weight among the DiT's `tensors`, by module name; empty without FP8 weights.

    `path` is the file of the tensors; the map with the scales is expected beside it. Reads the scales, one number
    each. Raises UserError if the map is missing or lacks a scale, or if a scale is not a finite number above 0.
    """
    weights = [name for name, tensor in tensors.items() if tensor.dtype.itemsize == 1]
    if not weights:
        return {}
    map_path = scales_file(path)
    if not map_path.is_file():
        raise UserError(
            f"{path} contains 8-bit weights (such as {weights[0]}), which need their scales. The scales are expected "
            f"in {map_path}, which does not exist. Copy the released map to this path, or set dit_weight to the bf16 "
            "file."
        )
    scales = named_tensors(open_file(map_path), map_path)
    modules = [name.removesuffix(".weight") for name in weights]
    if lacking := [name for name in modules if name not in scales]:
        raise UserError(
            f"{map_path} lacks the scales of {shortened(lacking)}, so it is not the map of {path.name}. "
            "Copy the map that belongs to this file."
        )
    if wrong := [name for name in modules if scales[name].numel != 1]:
        raise UserError(
            f"{map_path} must contain one number per module, but {shortened(wrong)} have more. Copy the released map."
        )
    values = {name: _number(scales[name]) for name in modules}
    if wrong := [f"{name} is {value:g}" for name, value in values.items() if not 0 < value < math.inf]:
        raise UserError(
            f"{map_path} must contain finite scales above 0, but {shortened(wrong)}: the weights would become zero, "
            "negated or infinite. Copy the released map."
        )
    return {name: scales[name] for name in modules}


def open_vae(tree: CheckpointTree) -> Tensors:
    """Return the VAE's tensors by their released names, unread.

    The names may be bare, under "state_dict", or prefixed by "vae.".
    """
    content = _open(tree.vae_weight)
    content = content.get("state_dict", content)
    # A file with a whole training state contains other modules besides the VAE.
    if isinstance(content, Mapping) and any(str(name).startswith("vae.") for name in content):
        content = {name.removeprefix("vae."): t for name, t in content.items() if str(name).startswith("vae.")}
    return named_tensors(content, tree.vae_weight)


def vae_config(tree: CheckpointTree) -> VAEConfig:
    """Read the config of the VAE. Raises UserError if it is missing or describes another architecture."""
    values = read_json(tree.vae_config)
    released = diffusers_layout.released_vae_config(values) if tree.is_diffusers else values
    return parse_vae_config(released, str(tree.vae_config))


def _plan_dit(tree: CheckpointTree, config: DiTConfig, attention: str, fp8: str) -> tuple[HYVideoDiT, Tensors]:
    """Return the model on the meta device and the tensors to fill it with."""
    with torch.device("meta"):
        model = HYVideoDiT(config, attention)
    path = tree.dit_file()
    tensors = open_dit(tree)
    remedy = "Set the option `dit` to the width and depth of this checkpoint"
    quantised = [name for name, tensor in tensors.items() if tensor.dtype.itemsize == 1]  # `open_scales` checks them
    check_tensors(_shapes(model), tensors, path, remedy, quantised=quantised)
    scales = open_scales(path, tensors)
    linears = block_linears(model)
    if unexpected := [name for name in scales if name not in linears or tensors[f"{name}.weight"].dtype != FP8]:
        raise UserError(
            f"{path} contains 8-bit weights that are not 8-bit in the release: {shortened(unexpected)}. Only the "
            "Linears of the blocks may be 8-bit, as float8_e4m3fn. Set dit_weight to the released FP8 or bf16 file."
        )
    if fp8 == "storage" and not scales:
        raise UserError(
            f"fp8: storage needs FP8 weights, but {path} contains no FP8 weights. Set dit_weight to the released "
            "mp_rank_00_model_states_fp8.pt, or convert the weights with `hv-batch weights convert --fp8`."
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
    check_tensors(_shapes(model), tensors, tree.vae_weight, f"Copy the {tree.vae_config.name} of the same VAE")
    return model, tensors


def _check_latents(tree: CheckpointTree, config: DiTConfig) -> None:
    """Raise UserError if the DiT does not read and write the latents of the VAE, or cannot divide them into patches."""
    time, *space = config.patch_size
    if (config.in_channels, config.out_channels) != (LATENT_CHANNELS, LATENT_CHANNELS):
        problem = f"in_channels {config.in_channels} and out_channels {config.out_channels}, allowed is"
        problem += f" {LATENT_CHANNELS}, the latent channels of the VAE"
    elif time != 1 or any(SIZE_MULTIPLE % (SPATIAL_COMPRESSION * side) for side in space):
        problem = f"patch_size {list(config.patch_size)}, allowed is [1, 2, 2]: every height and width that a manifest "
        problem += "may ask for must be a whole number of patches"
    else:
        return
    raise UserError(
        f"The DiT {tree.dit_file()} has {problem}. Set dit_weight to the text-to-video model, or correct its config."
    )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _number(scale: StoredTensor) -> float:
    return float(scale.read(CPU, torch.float32).reshape(())) if scale.dtype in PLAIN_DTYPES else math.nan


def _fill(model: nn.Module, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> None:
    """Read the tensors into a model on the meta device: FP8 tensors unchanged, the others in `dtype`."""
    state = {
        name: aligned(tensors[name].read(device, FP8 if empty.dtype == FP8 else dtype))
        for name, empty in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False).eval()


def aligned(tensor: Tensor) -> Tensor:
    """Copy the tensor if it is not aligned like an allocation of torch (P3).

    Matrix kernels of the CPU sum unaligned data in another order. Files of torch and of `hv-batch weights convert` are
    aligned; other safetensors files usually are not.
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
        raise UserError(f"{path} does not exist. {LAYOUT}")
    return open_file(path)
