"""The files of `hv-batch sample`: names, writing and reading.

Names are those of the release (time, seed and the beginning of the prompt), made safe for a file system. No file is
ever overwritten. Each video has a .json file with everything that its pixels depend on; a latents file has the same in
its metadata.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hv_batch.job.config.sections import MediaConfig
from hv_batch.job.storage.canonical_json import decode
from hv_batch.media.writer import write_media
from hv_batch.protocol import UserError
from hv_batch.sampling_params import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION

FPS = 24  # as in the release
PROMPT_CHARS = 100  # characters of the prompt in a file name
NAME_BYTES = 255 - len("_999.safetensors")  # limit of file systems, minus the longest ending
SUFFIXES = (".mp4", ".png", ".safetensors", ".json")
LATENT_DTYPES = ("F16", "F32", "F64")  # of safetensors: those that numpy has as well
MEDIA = MediaConfig(poster=False)  # otherwise the defaults of a run


def shorten(prompt: str) -> str:
    """Return the beginning of a prompt as in the release, without characters unsafe for file systems or terminals."""
    plain = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in prompt[:PROMPT_CHARS])
    return plain.replace("/", "").strip()


def free_stem(folder: Path, name: str, suffix: str) -> Path:
    """Return a path in `folder`, without suffix, that no file has yet. Raises UserError after a thousand tries."""
    now = datetime.now().strftime("%Y-%m-%d-%H:%M:%S")
    ending = _cut(f"_{shorten(suffix)}", NAME_BYTES // 2) if suffix else ""
    stem = _cut(f"{now}_{name}", NAME_BYTES - len(ending.encode())) + ending
    for count in range(1000):
        path = folder / (f"{stem}_{count}" if count else stem)
        if not any(path.with_name(path.name + end).exists() for end in SUFFIXES):
            return path
    raise UserError(f"{folder} has a thousand files named {stem}. Choose another --save-path.")


def _cut(text: str, num_bytes: int) -> str:
    """Return the longest beginning of `text` that fits in `num_bytes` bytes of UTF-8 without a partial character."""
    return text.encode()[:num_bytes].decode(errors="ignore")


def write_video(
    stem: Path, frames: Iterator[np.ndarray], latent_shape: Sequence[int], record: Mapping[str, Any]
) -> Path:
    """Write frames, decoded from latents of `latent_shape`, to an .mp4 or .png with its record. Returns its path."""
    _, latent_frames, height, width = latent_shape
    info = write_media(
        frames,
        stem,
        height=height * SPATIAL_COMPRESSION,
        width=width * SPATIAL_COMPRESSION,
        num_frames=(latent_frames - 1) * TEMPORAL_COMPRESSION + 1,
        fps=FPS,
        media=MEDIA,
    )
    _write_record(
        stem,
        {
            **record,
            "file": info.path.name,
            "sha256": info.sha256,
            "frames_sha256": info.frames_sha256,
            "fps": FPS,
            "media": MEDIA.model_dump(mode="json"),
        },
    )
    return info.path


def write_latents(stem: Path, latents: np.ndarray, record: Mapping[str, Any]) -> Path:
    """Write final latents [16, T, h, w] with their record in the metadata. Returns the path."""
    path = stem.with_name(stem.name + ".safetensors")
    path.write_bytes(save({"latents": latents}, metadata={"record": json.dumps(record)}))
    return path


def _write_record(stem: Path, record: Mapping[str, Any]) -> None:
    path = stem.with_name(stem.name + ".json")
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_latents(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Return latents [16, T, h, w] in float32, and their record (empty if there is none).

    Raises UserError if the file does not exist or has no latents of this model.
    """
    try:
        with safe_open(path, framework="np") as file:
            if (dtype := file.get_slice("latents").get_dtype()) not in LATENT_DTYPES:
                raise ValueError(f"they are {dtype}; allowed: {', '.join(LATENT_DTYPES)}")
            latents = file.get_tensor("latents")
            record = decode((file.metadata() or {}).get("record", "{}").encode())
    except FileNotFoundError:
        raise UserError(f"--from-latents {path} does not exist.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"--from-latents {path} is not a .safetensors file with a tensor 'latents': {error}. Give a file that "
            "--latents-only has written."
        ) from error
    if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS or 0 in latents.shape:
        raise UserError(
            f"--from-latents {path} has latents of shape {list(latents.shape)}. Expected [{LATENT_CHANNELS}, frames, "
            "height, width], each at least 1."
        )
    return latents.astype(np.float32), record
