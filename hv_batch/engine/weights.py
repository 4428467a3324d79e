"""Checkpoint files into modules: read, refused with the reason, or loaded whole.

Modules are built on the meta device and their tensors come one at a time out of a memory map. So the host never holds
a second copy, and ranks of one node that keep the file's dtype on the CPU share its pages. Every tensor of the file
must have its place in the module, by name and shape, and the other way round. Nothing but tensors is ever unpickled.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hv_batch.engine.checkpoint import LAYOUT, CheckpointTree
from hv_batch.engine.dit import DiTConfig, HYVideoDiT
from hv_batch.engine.vae import CausalVAE, VAEConfig
from hv_batch.protocol import UserError

_COPY_AGAIN = "Compare its size and checksum with the release and copy it again."
_NAMES_SHOWN = 4  # of mismatching tensors: enough to recognise a wrong width, depth or prefix


def load_dit(
    tree: CheckpointTree, config: DiTConfig, attention: str, dtype: torch.dtype, device: torch.device
) -> HYVideoDiT:
    """The DiT in `dtype` on `device` with the named attention backend, ready for inference.

    Raises UserError when the file is missing or unreadable, or is not a checkpoint of `config`.
    """
    with torch.device("meta"):
        model = HYVideoDiT(config, attention)
    _fill(model, _read_dit(tree), tree.dit_file(), dtype, device)
    return model


def load_vae(tree: CheckpointTree, dtype: torch.dtype, device: torch.device) -> CausalVAE:
    """The VAE in `dtype` on `device`, ready for inference; errors as of `load_dit`."""
    model = _vae_on_meta(tree)
    _fill(model, _read_vae(tree), tree.vae_weight, dtype, device)
    return model


def verify(tree: CheckpointTree, config: DiTConfig) -> list[str]:
    """What would stop `load_dit` and `load_vae`, found without reading tensor data: seconds for any size of model."""
    if missing := tree.missing():
        return missing
    found = []
    with torch.device("meta"):
        dit = HYVideoDiT(config)
    checks: tuple[Callable[[], None], ...] = (
        lambda: _refuse_mismatch(dit, _read_dit(tree), tree.dit_file()),
        lambda: _refuse_mismatch(_vae_on_meta(tree), _read_vae(tree), tree.vae_weight),
    )
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


def _vae_on_meta(tree: CheckpointTree) -> CausalVAE:
    config = VAEConfig.from_json(_read_json(tree.vae_config))
    with torch.device("meta"):
        return CausalVAE(config)


def _read_dit(tree: CheckpointTree) -> dict[str, Tensor]:
    path = tree.dit_file()
    content = _read_file(path)
    if tree.load_key not in content and not _all_tensors(content):
        raise UserError(
            f"{path} has no {tree.load_key!r} (the load_key); its keys are {', '.join(map(repr, content))}. "
            "Set load_key to the one that holds the tensors."
        )
    state = _named_tensors(content.get(tree.load_key, content), path)
    if quantised := [name for name, tensor in state.items() if tensor.dtype.itemsize == 1]:
        raise UserError(
            f"{path} holds 8-bit weights (as {quantised[0]}), which mean nothing without their scales and cannot be "
            "used yet. Name the bf16 file mp_rank_00_model_states.pt as dit_weight."
        )
    return state


def _read_vae(tree: CheckpointTree) -> dict[str, Tensor]:
    content = _read_file(tree.vae_weight)
    content = content.get("state_dict", content)
    # A file of a whole training state holds other modules beside the VAE.
    if any(name.startswith("vae.") for name in content):
        content = {name.removeprefix("vae."): t for name, t in content.items() if name.startswith("vae.")}
    return _named_tensors(content, tree.vae_weight)


def _named_tensors(value: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(value, Mapping) or not _all_tensors(value):
        raise UserError(f"{path} should hold tensors by name and holds something else. {_COPY_AGAIN}")
    return dict(value)


def _all_tensors(content: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in content.values())


def _read_file(path: Path) -> dict[str, Any]:
    """The content of a .pt or .safetensors file, memory-mapped wherever its format can be."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # Files of torch < 1.6 are no zip archives and cannot be mapped; neither can a truncated one, whose directory
        # stood at the end: torch then says what it found.
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; {LAYOUT}") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is damaged or not a checkpoint: {reason} {_COPY_AGAIN}"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} should hold tensors by name and holds a {type(content).__name__}. {_COPY_AGAIN}")
    return dict(content)


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Move `state` into a model that stands on the meta device, emptying `state` as it goes."""
    _refuse_mismatch(model, state, path)
    model.load_state_dict({name: state.pop(name).to(device, dtype) for name in list(state)}, strict=True, assign=True)
    model.requires_grad_(False).eval()


def _refuse_mismatch(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differences = {
        "missing": [name for name in expected if name not in given],
        "not of this model": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} is {list(given[name])}, should be {list(shape)}"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ],
    }
    told = [f"{len(names)} {what} ({_first(names)})" for what, names in differences.items() if names]
    if told:
        raise UserError(
            f"{path} does not fit the configured model: of its tensors {'; '.join(told)}. "
            "Set the model's options to the width and depth of this checkpoint, or name the right file."
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; {LAYOUT}") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}). {_COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object and holds a {type(value).__name__}. {_COPY_AGAIN}")
    return value
