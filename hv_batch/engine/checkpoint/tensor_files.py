"""Files of tensors, opened but not read: .pt, .safetensors, and the index of a sharded one.

What is opened is a name, a shape and a dtype each; the bytes come one tensor at a time out of a memory map, when they
are asked for. A tensor that stays on the host in the file's own dtype is not copied: its pages are the page cache's,
which all processes of a node share and the system may drop. Nothing but tensors is ever unpickled.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hv_batch.protocol import UserError

INDEX_SUFFIX = ".index.json"
COPY_AGAIN = "Compare its size and checksum with the release and copy it again."
CPU = torch.device("cpu")
_LFS_POINTER = b"version https://git-lfs"  # how the file begins that stands for one that was not downloaded
ALIGNMENT = 64  # bytes: where torch's own allocations and the tensors of its files begin

DTYPE_NAMES: Mapping[str, torch.dtype] = {  # safetensors' name of a dtype
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
    """One tensor of a file. `read` brings it to a device and dtype; on the CPU in its own dtype it may be a view of
    the file, which must not be written to."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[torch.device, torch.dtype], Tensor]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def stored(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.to)


def joined(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Parts one under the other (along dimension 0), joined on the device that asks for them.

    Raises ValueError when they differ in another dimension.
    """
    first = parts[0]
    if any(part.shape[1:] != first.shape[1:] for part in parts):
        raise ValueError(f"shapes {[list(part.shape) for part in parts]} cannot be joined")
    rows = sum(part.shape[0] for part in parts)
    return StoredTensor(
        (rows, *first.shape[1:]),
        first.dtype,
        lambda device, dtype: torch.cat([part.read(device, dtype) for part in parts]),
    )


def open_file(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file: `StoredTensor`s by name, or, in a .pt file, whatever its keys lead to.

    `path` may be an index, whose shards lie beside it. Raises UserError for a file that is missing, damaged, truncated,
    no checkpoint, or that would have to run code to be read.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there.")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, SafetensorError) as error:
        raise UserError(_unreadable(path, error)) from error


def shard_files(path: Path) -> list[Path]:
    """The files that hold the tensors of `path`: itself, or the shards that an index names.

    Raises UserError when the index cannot be read.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    try:
        names = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or not an index of shards ({error!r}). {COPY_AGAIN}") from error
    return [path.with_name(name) for name in sorted(names)]


def named_tensors(content: Any, path: Path) -> dict[str, StoredTensor]:
    """`content` as tensors by name, or UserError when it holds anything else."""
    if not isinstance(content, Mapping) or not all_tensors(content):
        raise UserError(f"{path} should hold tensors by name and holds something else. {COPY_AGAIN}")
    return {name: stored(value) if isinstance(value, Tensor) else value for name, value in content.items()}


def all_tensors(content: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Tensor | StoredTensor) for value in content.values())


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    """All tensors of all shards: a name that is in a shard but not in the index would otherwise vanish silently."""
    tensors: dict[str, StoredTensor] = {}
    for shard in shard_files(index):
        if not shard.is_file():
            raise UserError(f"{shard} is not there, but {index.name} names it. Copy the missing file.")
        tensors |= named_tensors(open_file(shard), shard)
    return tensors


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    file = safe_open(path, framework="pt")  # stays open as long as one of its tensors is referred to

    def tensor(name: str) -> StoredTensor:
        header = file.get_slice(name)
        dtype = DTYPE_NAMES.get(header.get_dtype())
        if dtype is None:
            raise ValueError(f"{name} has the dtype {header.get_dtype()}, which is not known here.")
        return StoredTensor(
            tuple(header.get_shape()), dtype, lambda device, dtype: file.get_tensor(name).to(device, dtype)
        )

    return {name: tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _open_pickle(path: Path) -> dict[str, Any]:
    # Files of torch < 1.6 are no zip archives and cannot be mapped; neither can a truncated one, whose directory stood
    # at the end: torch then says what it found.
    content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} should hold tensors by name and holds a {type(content).__name__}. {COPY_AGAIN}")
    return dict(content)


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
        return (
            f"{path} holds more than tensors: to read it, {found[1]} would have to run, and nothing that a checkpoint "
            "brings along ever does. Get these weights as safetensors, or as a .pt file of tensors alone."
        )
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    if is_pointer:
        return f"{path} is a pointer of Git LFS, not the file itself. Get that with `git lfs pull`, or copy it again."
    # torch tells in front how its checks could be turned off, and behind how likely it is that the file is damaged.
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(". ")[0]
    size = path.stat().st_size
    told = reason.rstrip(".") if size else "it is empty"
    return f"{path} ({size} bytes) is damaged or not a checkpoint: {told}. {COPY_AGAIN}"
