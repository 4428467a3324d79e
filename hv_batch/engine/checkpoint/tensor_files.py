"""Lazy access to files of tensors: .pt, .safetensors, and sharded .safetensors with an index.

Opening a file reads the name, shape and dtype of each tensor. The data is read tensor by tensor from a memory map, on
demand. A tensor that stays on the host in the file's dtype is not copied: it uses pages of the page cache, which all
processes of a node share and which the system may drop. Only tensors are ever unpickled.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hv_batch.engine.checkpoint.json_files import COPY_AGAIN, read_json
from hv_batch.protocol import UserError

INDEX_SUFFIX = ".index.json"
SHARD_SUFFIXES = (".safetensors", ".bin", ".pt")
MAX_NAME_BYTES = 255  # of a file, on every usual file system
CPU = torch.device("cpu")
_LFS_POINTER = b"version https://git-lfs"  # first bytes of a Git LFS pointer file
ALIGNMENT = 64  # bytes; alignment of torch's allocations and of the tensors in its files

DTYPE_NAMES: Mapping[str, torch.dtype] = {  # by the name of the dtype in safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    `read(device, dtype)` loads it. On the CPU in the file's dtype the result may be a view of the file, which must not
    be modified.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[torch.device, torch.dtype], Tensor]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


Tensors = dict[str, StoredTensor]


def stored(tensor: Tensor) -> StoredTensor:
    """Wrap a tensor in memory."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.to)


def joined(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Concatenate parts along dimension 0, on the target device when the tensor is read.

    Raises ValueError if the parts differ in another dimension.
    """
    first = parts[0]
    if not first.shape or any(not part.shape or part.shape[1:] != first.shape[1:] for part in parts):
        raise ValueError(f"shapes {[list(part.shape) for part in parts]} cannot be concatenated")
    rows = sum(part.shape[0] for part in parts)
    return StoredTensor(
        (rows, *first.shape[1:]),
        first.dtype,
        lambda device, dtype: torch.cat([part.read(device, dtype) for part in parts]),
    )


def open_file(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file: `StoredTensor`s by name, or the top-level dict of a .pt file.

    `path` may be an index; its shards are expected beside it. Raises UserError if the file is missing, damaged,
    truncated or not a checkpoint, or if loading it would run code.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist. Check the path.")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). Check its permissions and the disk.") from error
    except Exception as error:  # a damaged pickle makes torch raise errors of any class
        raise UserError(_unreadable(path, error)) from error


def shard_files(path: Path) -> list[Path]:
    """Return the files that hold the tensors of `path`: `path` itself, or the shards of an index.

    Raises UserError if the index cannot be read, or if it names anything but files beside it.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} is damaged or not an index of shards: it has no weight_map. {COPY_AGAIN}")
    names = list(weight_map.values())
    if wrong := [name for name in names if not _is_shard_name(name)]:
        raise UserError(
            f"{path} is not a valid index: its weight_map names {str(wrong[0])[:80]!r}; allowed are names of files "
            f"beside it that end in {', '.join(SHARD_SUFFIXES)}. {COPY_AGAIN}"
        )
    return [path.with_name(name) for name in sorted(set(names))]


def _is_shard_name(name: Any) -> bool:
    """Return whether it names a file beside the index; an index must not lead to files elsewhere."""
    if not isinstance(name, str) or name != Path(name).name or not name.endswith(SHARD_SUFFIXES):
        return False
    return name.isprintable() and len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES


def named_tensors(content: Any, path: Path) -> dict[str, StoredTensor]:
    """Return `content` as tensors by name. Raises UserError if it contains anything else."""
    if not isinstance(content, Mapping) or not all_tensors(content) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must contain tensors by name but contains other values. {COPY_AGAIN}")
    return {name: stored(value) if isinstance(value, Tensor) else value for name, value in content.items()}


def all_tensors(content: Mapping[str, Any]) -> bool:
    """Return whether all values are tensors, in memory or stored."""
    return all(isinstance(value, Tensor | StoredTensor) for value in content.values())


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    """Return all tensors of all shards, including those that the index does not name, so that none is lost silently."""
    tensors: dict[str, StoredTensor] = {}
    for shard in shard_files(index):
        if not shard.is_file():
            raise UserError(f"{shard} does not exist, but {index.name} names it. Copy the missing file.")
        tensors |= named_tensors(open_file(shard), shard)
    return tensors


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    file = safe_open(path, framework="pt")  # stays open as long as one of its tensors is referenced

    def tensor(name: str) -> StoredTensor:
        header = file.get_slice(name)
        dtype = DTYPE_NAMES.get(header.get_dtype())
        if dtype is None:
            raise ValueError(f"{name} has the dtype {header.get_dtype()}, which is not supported.")
        return StoredTensor(
            tuple(header.get_shape()), dtype, lambda device, dtype: file.get_tensor(name).to(device, dtype)
        )

    return {name: tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _open_pickle(path: Path) -> dict[str, Any]:
    # Files of torch < 1.6 are not zip archives and cannot be mapped. A truncated archive has lost its directory, which
    # is at the end, so it is not recognised as an archive either; torch then raises the reason.
    content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must contain tensors by name but contains a {type(content).__name__}. {COPY_AGAIN}")
    return dict(content)


def _unreadable(path: Path, error: Exception) -> str:
    """Return the message of the UserError for a file that cannot be read."""
    if isinstance(error, pickle.UnpicklingError) and (match := re.search(r"GLOBAL (\S+)", str(error))):
        return (
            f"{path} contains objects other than tensors: loading it would run {match[1]}, and hv_batch never runs "
            "code from a checkpoint. Use these weights as safetensors, or as a .pt file that contains tensors only."
        )
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    if is_pointer:
        return f"{path} is a Git LFS pointer, not the file itself. Download it with `git lfs pull`, or copy it again."
    # Remove torch's hint on how to disable its checks, which precedes the reason, and its comments after the reason.
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(". ")[0]
    size = path.stat().st_size
    cause = reason.rstrip(".") if size else "it is empty"
    return f"{path} ({size} bytes) is damaged or not a checkpoint: {cause}. {COPY_AGAIN}"
