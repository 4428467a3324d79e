"""Read the weights completely: checksums, sizes and values. This finds damage that the headers do not show."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from hv_batch.engine.checkpoint.json_files import COPY_AGAIN
from hv_batch.engine.checkpoint.matching import shortened
from hv_batch.engine.checkpoint.tensor_files import CPU, StoredTensor

_READ_BYTES = 2**20
_HEADER_LENGTH = 8  # bytes of the length of the header, at the beginning of a safetensors file


def find_damage(files: Iterable[Path]) -> Iterator[str]:
    """Yield one sentence for each damaged file.

    Reads every byte of a .pt or .bin file and compares its checksums (CRC-32). A safetensors file has none; its size is
    compared with its header.
    """
    for path in files:
        if path.suffix == ".safetensors":
            problem = _wrong_size(path)
        else:
            problem = _wrong_checksums(path) if zipfile.is_zipfile(path) else None
        if problem:
            yield f"{path} is damaged: {problem}. {COPY_AGAIN}"


def find_non_finite(tensors: Mapping[str, StoredTensor], path: Path) -> Iterator[str]:
    """Yield a sentence if tensors of a part contain NaN or infinity. Reads them one by one."""
    names = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if names:
        yield f"{path} has {len(names)} tensor(s) with NaN or infinity ({shortened(names)}). {COPY_AGAIN}"


def _is_finite(tensor: StoredTensor) -> bool:
    if not tensor.dtype.is_floating_point:
        return True
    values = tensor.read(CPU, tensor.dtype)
    wide = values.to(torch.bfloat16) if tensor.dtype.itemsize == 1 else values  # isfinite does not support 8 bits
    return bool(torch.isfinite(wide).all())


def _wrong_checksums(path: Path) -> str | None:
    """Return what is wrong with the records of an archive of torch.save."""
    wrong = []
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        for record in records:
            try:
                with archive.open(record) as file:
                    while file.read(_READ_BYTES):
                        pass
            except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
                wrong.append(record.filename)
    if not wrong:
        return None
    message = f"the checksums of {len(wrong)} of {len(records)} records are wrong ({shortened(wrong)})"
    if len(wrong) == len(records):
        message += ", or it was written without checksums (torch.serialization.set_crc32_options(False))"
    return message


def _wrong_size(path: Path) -> str | None:
    """Return what is wrong with the size of a safetensors file, whose header `open_file` has read before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected, size = _HEADER_LENGTH + length + max(ends, default=0), path.stat().st_size
    return None if size == expected else f"it has {size} bytes, but its header describes {expected}"
