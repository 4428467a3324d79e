"""Checkpoint trees: where their files lie, which are missing, which revision they are.

The released layout (spec section 7), and the safetensors that `hv-batch weights convert` makes of it:

model_base/
  hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt    {"module": tensors}, perhaps {"ema": tensors}
                                   or model.safetensors, or model.safetensors.index.json and its shards
                                      ..._map.pt or .safetensors     the scales, where the weights are FP8
                                      config.json                    only where the widths are not the released ones
  hunyuan-video-t2v-720p/vae/config.json, pytorch_model.pt           or model.safetensors
  text_encoder/                                                     the LLaMA language model and its tokenizer
  text_encoder_2/                                                   CLIP ViT-L/14 and its tokenizer

diffusers' layout is `hv_batch.engine.diffusers_layout`'s; it is recognised by its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hv_batch.engine import diffusers_layout
from hv_batch.engine.tensor_files import COPY_AGAIN, INDEX_SUFFIX, shard_files
from hv_batch.engine.text import text_problems
from hv_batch.protocol import UserError

LAYOUT = (
    "the layout is <model_base>/{hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt, "
    "hunyuan-video-t2v-720p/vae/{config.json,pytorch_model.pt}, text_encoder/, text_encoder_2/}, "
    "or that of diffusers: transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/"
)

MODEL = "hunyuan-video-t2v-720p"
DIT_CLASS = "HYVideoDiT"  # marks a config.json beside the DiT's weights as ours: fields of `DiTConfig`
CONVERTED = "model.safetensors"  # what `hv-batch weights convert` writes, or its index

# What the text towers may read from their folders. A README or a downloader's notes do not change a picture.
_TEXT_TOWER_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors", ".bin"})

# Below this a file is digested whole. Above, 64 blocks of 256 KiB spread evenly over it are: 16 MiB a file keeps the
# digest of the released 40 GB tree at seconds even on a network disk.
_DIGEST_WHOLE_BELOW = 16 * 2**20
_DIGEST_BLOCKS = 64
_DIGEST_BLOCK = 256 * 2**10


@dataclass(frozen=True, slots=True)
class CheckpointTree:
    """The paths of one checkpoint. `dit_weight` replaces the default DiT file by another file or by a folder of one."""

    model_base: Path
    dit_weight: Path | None = None
    load_key: str = "module"

    @property
    def is_diffusers(self) -> bool:
        return diffusers_layout.is_diffusers_tree(self.model_base)

    @property
    def _vae(self) -> Path:
        return self.model_base / "vae" if self.is_diffusers else self.model_base / MODEL / "vae"

    @property
    def vae_config(self) -> Path:
        return self._vae / "config.json"

    @property
    def vae_weight(self) -> Path:
        """The VAE's file; where there is none, the one that is expected first."""
        if self.is_diffusers:
            return self._vae / diffusers_layout.WEIGHTS
        return _first_file(self._vae, "pytorch_model.pt", CONVERTED) or self._vae / "pytorch_model.pt"

    @property
    def text_encoder(self) -> Path:
        return self.model_base / "text_encoder"

    @property
    def text_encoder_2(self) -> Path:
        return self.model_base / "text_encoder_2"

    @property
    def tokenizer(self) -> Path:
        return self.model_base / "tokenizer" if self.is_diffusers else self.text_encoder

    @property
    def tokenizer_2(self) -> Path:
        return self.model_base / "tokenizer_2" if self.is_diffusers else self.text_encoder_2

    def dit_file(self) -> Path:
        """The file that holds the DiT's tensors, or the index of its shards; it need not exist.

        Raises UserError when `dit_weight` is a folder that holds none, or several. In such a folder, as the official
        loader: `pytorch_model_<load_key>.pt`, else the `*_model_states.pt` of DeepSpeed; else safetensors.
        """
        if self.dit_weight is None:
            if self.is_diffusers:
                folder = self.model_base / "transformer"
                return _safetensors(folder) or folder / diffusers_layout.WEIGHTS
            folder = self.model_base / MODEL / "transformers"
            default = folder / "mp_rank_00_model_states.pt"
            return default if default.is_file() else _safetensors(folder) or default
        if not self.dit_weight.is_dir():
            return self.dit_weight
        bare = self.dit_weight / f"pytorch_model_{self.load_key}.pt"
        if bare.is_file():
            return bare
        files = sorted(self.dit_weight.glob("*_model_states.pt"))
        if len(files) == 1:
            return files[0]
        if not files and (safetensors := _safetensors(self.dit_weight)):
            return safetensors
        found = "several: " + ", ".join(file.name for file in files) if files else "neither"
        raise UserError(
            f"dit_weight is the folder {self.dit_weight}, which should hold {bare.name} or one *_model_states.pt (or "
            f"{CONVERTED}, or {CONVERTED}{INDEX_SUFFIX}) and holds {found}. Name the file itself."
        )

    def dit_options(self) -> dict[str, Any]:
        """Fields of `DiTConfig` that the config.json beside the DiT's weights sets; none where there is no such file.

        Raises UserError when the file is damaged or of another model.
        """
        try:
            path = self.dit_file().with_name("config.json")
        except UserError:  # `missing` tells it
            return {}
        if not path.is_file():
            return {}
        values = read_json(path)
        if self.is_diffusers or values.get("_class_name") == diffusers_layout.DIT_CLASS:
            return diffusers_layout.dit_options(values, path)
        # Any other file of this name may be about anything.
        return (
            {key: values[key] for key in values if key != "_class_name"}
            if values.get("_class_name") == DIT_CLASS
            else {}
        )

    def missing(self) -> list[str]:
        """One sentence for each file that is not there, with the path where it is expected; empty when complete."""
        if not self.model_base.is_dir():
            return [f"model_base {self.model_base} is not a folder; {LAYOUT}"]
        found: list[str] = []
        required = [("VAE config", self.vae_config)]
        for name, locate in (("DiT weights", self.dit_file), ("VAE weights", lambda: self.vae_weight)):
            try:
                file = locate()
                required += [(name, path) for path in ([file] if not file.is_file() else shard_files(file))]
            except UserError as error:
                found.append(str(error))
        found += [f"{name} missing: {path} is not there" for name, path in required if not path.is_file()]
        found += text_problems(self.text_encoder, self.text_encoder_2, self.tokenizer, self.tokenizer_2)
        return [f"{sentence}; {LAYOUT}" for sentence in found]


def scales_file(dit_file: Path) -> Path:
    """Where the scales of FP8 weights lie: `x.pt` has `x_map.pt`, as released; `x.safetensors` `x_map.safetensors`."""
    stem = dit_file.name.removesuffix(INDEX_SUFFIX)
    path = dit_file.with_name(stem)
    return path.with_name(f"{path.stem}_map{path.suffix}")


def revision(tree: CheckpointTree) -> str:
    """A digest, 64 hex digits, of the weights, configs and tokenizers that this tree would load (promise P3).

    Covers each file's role, name and size, all bytes of a file below 16 MiB, and of a larger one 64 evenly spread
    blocks of 256 KiB, its first and last among them. So it notices another, retrained, re-cast or truncated checkpoint,
    but not a few changed bytes between two blocks of a large file: it is no proof against bit rot or a forger. It
    depends neither on where the tree lies nor on file times. Raises UserError when a file is missing.
    """
    if missing := tree.missing():
        raise UserError(missing[0])
    return _digest_files(chain(_pixel_files(tree), _text_files(tree)))


def text_revision(tree: CheckpointTree) -> str:
    """The same for the text encoders and their tokenizers alone, which other checkpoints may share."""
    if missing := tree.missing():
        raise UserError(missing[0])
    return _digest_files(_text_files(tree))


def _digest_files(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        digest_file(digest, name, path)
    return digest.hexdigest()


def digest_file(digest: Any, name: str, path: Path) -> None:
    """Add a file to a hashlib digest: `name`, its size, and its bytes or blocks of them, as `revision` says."""
    size = path.stat().st_size
    digest.update(f"{name}\0{size}\0".encode())
    with path.open("rb") as file:
        for offset, length in _digest_blocks(size):
            file.seek(offset)
            digest.update(file.read(length))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file, or UserError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; {LAYOUT}") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}). {COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object and holds a {type(value).__name__}. {COPY_AGAIN}")
    return value


def _pixel_files(tree: CheckpointTree) -> Iterator[tuple[str, Path]]:
    # The DiT is named by its role: under another file name the same bytes make the same pictures.
    dit = tree.dit_file()
    yield "dit", dit
    shards = shard_files(dit)
    if shards != [dit]:
        yield from ((f"dit/{number}", shard) for number, shard in enumerate(shards))
    if scales_file(dit).is_file():
        yield "dit map", scales_file(dit)
    yield "vae/config.json", tree.vae_config
    yield "vae/pytorch_model.pt", tree.vae_weight


def _text_files(tree: CheckpointTree) -> Iterator[tuple[str, Path]]:
    # In diffusers' layout four folders, in the released one two.
    for folder in dict.fromkeys((tree.text_encoder, tree.text_encoder_2, tree.tokenizer, tree.tokenizer_2)):
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith(".") and path.suffix in _TEXT_TOWER_SUFFIXES:
                yield f"{folder.name}/{path.name}", path


def _safetensors(folder: Path) -> Path | None:
    """The safetensors file of a folder, or the index of its shards, under our name or diffusers'."""
    names = [name + suffix for name in (CONVERTED, diffusers_layout.WEIGHTS) for suffix in (INDEX_SUFFIX, "")]
    return _first_file(folder, *names)


def _first_file(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _digest_blocks(size: int) -> list[tuple[int, int]]:
    """(offset, length) of the parts of a file of `size` bytes that enter the digest."""
    if size < _DIGEST_WHOLE_BELOW:
        return [(0, size)]
    last = size - _DIGEST_BLOCK
    return [(last * i // (_DIGEST_BLOCKS - 1), _DIGEST_BLOCK) for i in range(_DIGEST_BLOCKS)]
