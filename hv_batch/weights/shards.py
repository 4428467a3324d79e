"""Write safetensors files one tensor at a time, in the memory of the largest tensor.

A file appears complete or not at all, and its header names the source it was made from. A writer that was killed
therefore resumes at the first missing file, and never mixes the shards of two models. The index is written last: a
folder without an index is incomplete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from hv_batch.engine.checkpoint.tensor_files import ALIGNMENT, CPU, DTYPE_NAMES, INDEX_SUFFIX, StoredTensor
from hv_batch.protocol import UserError

SHARD_BYTES = 5 * 10**9  # as the tools of the hub split them

OnBytes = Callable[[int], None]  # called with the number of further bytes that are done

_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}
_SOURCE = "hv_batch_source"  # header key


def ignore_bytes(_: int) -> None:
    pass


def write_sharded(
    folder: Path,
    stem: str,
    tensors: Mapping[str, StoredTensor],
    source: str,
    on_bytes: OnBytes = ignore_bytes,
    *,
    before_index: Callable[[], object] = lambda: None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `<stem>-00001-of-0000N.safetensors` and so on, then their index, and return the index.

    `source` identifies the origin of the tensors; existing shards of the same source are kept. `before_index` runs
    after all shards are written. Raises UserError if a shard of another source exists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = list(_split(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
        write_file(folder / name, group, source, on_bytes)
        weight_map |= dict.fromkeys(group, name)
    before_index()
    index = folder / f"{stem}.safetensors{INDEX_SUFFIX}"
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")
    return index


def write_file(path: Path, tensors: Mapping[str, StoredTensor], source: str, on_bytes: OnBytes = ignore_bytes) -> None:
    """Write one safetensors file, unless it exists with the same source. Raises UserError if it has another source."""
    if path.exists():
        if _source_of(path) != source:
            raise UserError(f"{path} exists and was made from another source. Choose another target.")
        on_bytes(sum(tensor.nbytes for tensor in tensors.values()))
        return
    # The format allows no gaps. To align as many tensors as possible, tensors whose size is a multiple of the alignment
    # come first, then those of wide dtypes.
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT > 0, -item[1].dtype.itemsize)))
    with _draft(path) as file:
        file.write(_header(ordered, source))
        for tensor in ordered.values():
            data = tensor.read(CPU, tensor.dtype).contiguous().reshape(-1)
            if (data.numel(), data.dtype) != (tensor.numel, tensor.dtype):
                raise AssertionError(f"a tensor of {path} differs from its header in size or dtype")
            file.write(data.view(torch.uint8).numpy().data)
            on_bytes(tensor.nbytes)


def write_text(path: Path, text: str) -> None:
    with _draft(path) as file:
        file.write(text.encode())


def _header(tensors: Mapping[str, StoredTensor], source: str) -> bytes:
    """Return the header: the length of the JSON (8 bytes, little-endian), then the JSON, padded to align the data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", _SOURCE: source}}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _split(tensors: Mapping[str, StoredTensor], shard_bytes: int) -> Iterator[dict[str, StoredTensor]]:
    """Yield the tensors in order, in groups of at most `shard_bytes`; a larger tensor has a group of its own."""
    group: dict[str, StoredTensor] = {}
    filled = 0
    for name, tensor in tensors.items():
        if group and filled + tensor.nbytes > shard_bytes:
            yield group
            group, filled = {}, 0
        group[name] = tensor
        filled += tensor.nbytes
    if group:
        yield group


def _source_of(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_SOURCE)
    except (SafetensorError, OSError):
        return None


@contextmanager
def _draft(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that is renamed to `path` at the end of the block, and deleted if the block fails."""
    draft = path.with_name(f".{path.name}.part")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
