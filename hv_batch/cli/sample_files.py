"""The files of `hv-batch sample`: their names, what is written, and what is read back.

Named as in the release, by time, seed and the beginning of the prompt, made safe for a file system; no file is ever
overwritten. Beside a video lies a .json with all that its pixels depend on; latents carry the same inside.
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
from hv_batch.media.writer import write_media
from hv_batch.protocol import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, UserError

FPS = 24  # of the release, like the names
PROMPT_CHARS = 100  # of a prompt in a file name
NAME_BYTES = 255 - len("_999.safetensors")  # what file systems allow, less the longest ending
SUFFIXES = (".mp4", ".png", ".safetensors", ".json")
MEDIA = MediaConfig()  # as a run


def shorten(prompt: str) -> str:
    """The beginning of a prompt as the release cuts it, without what a file system or a terminal cannot bear."""
    plain = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in prompt[:PROMPT_CHARS])
    return plain.replace("/", "").strip()


def free_stem(folder: Path, name: str, suffix: str) -> Path:
    """A path without ending that no file has yet."""
    now = datetime.now().strftime("%Y-%m-%d-%H:%M:%S")
    ending = _cut(f"_{shorten(suffix)}", NAME_BYTES // 2) if suffix else ""
    stem = _cut(f"{now}_{name}", NAME_BYTES - len(ending.encode())) + ending
    for count in range(1000):
        path = folder / (f"{stem}_{count}" if count else stem)
        if not any(path.with_name(path.name + end).exists() for end in SUFFIXES):
            return path
    raise UserError(f"{folder} holds a thousand files called {stem}; name another --save-path.")


def _cut(text: str, num_bytes: int) -> str:
    """As much of `text` as fits, ending with a whole character."""
    return text.encode()[:num_bytes].decode(errors="ignore")


def write_video(
    stem: Path, frames: Iterator[np.ndarray], latent_shape: Sequence[int], record: Mapping[str, Any]
) -> None:
    """Encode the frames of latents of `latent_shape` into an .mp4 or .png, add its record, and print its path."""
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
    print(info.path)


def write_latents(stem: Path, latents: np.ndarray, record: Mapping[str, Any]) -> None:
    """Write final latents [16, T, h, w] with their record inside, and print the path."""
    path = stem.with_name(stem.name + ".safetensors")
    path.write_bytes(save({"latents": latents}, metadata={"record": json.dumps(record)}))
    print(path)


def _write_record(stem: Path, record: Mapping[str, Any]) -> None:
    path = stem.with_name(stem.name + ".json")
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_latents(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Latents [16, T, h, w] in float32 and the record they were written with, if any."""
    try:
        with safe_open(path, framework="np") as file:
            latents = file.get_tensor("latents")
            record = json.loads((file.metadata() or {}).get("record", "{}"))
        if not isinstance(record, dict):
            raise ValueError("its record is no JSON object")
    except FileNotFoundError:
        raise UserError(f"--from-latents {path} is not there.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"--from-latents {path} is not a .safetensors file with a tensor 'latents': {error}. Name one that "
            "--latents-only wrote."
        ) from error
    if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS or 0 in latents.shape:
        raise UserError(
            f"--from-latents {path} holds latents of shape {list(latents.shape)}; allowed is [{LATENT_CHANNELS}, "
            "frames, height, width]."
        )
    return latents.astype(np.float32), record
