"""Checkpoint trees: where their files lie, and which are missing.

The released layout (spec section 7), and the safetensors that `hv-batch weights convert` makes of it:

model_base/
  hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt    {"module": tensors}, perhaps {"ema": tensors}
                                   or model.safetensors, or model.safetensors.index.json and its shards
                                      ..._map.pt or .safetensors     the scales, where the weights are FP8
                                      config.json                    only where the widths are not the released ones
  hunyuan-video-t2v-720p/vae/config.json, pytorch_model.pt           or model.safetensors
  text_encoder/                                                     the LLaMA language model and its tokenizer
  text_encoder_2/                                                   CLIP ViT-L/14 and its tokenizer

diffusers' layout is `hv_batch.engine.checkpoint.diffusers_layout`'s; it is recognised by its files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hv_batch.architecture import DIT_CLASS
from hv_batch.engine.checkpoint import diffusers_layout
from hv_batch.engine.checkpoint.tensor_files import COPY_AGAIN, INDEX_SUFFIX, shard_files
from hv_batch.engine.checkpoint.text_files import missing_text_files
from hv_batch.protocol import UserError

LAYOUT = (
    "The layout is <model_base>/{hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt, "
    "hunyuan-video-t2v-720p/vae/{config.json,pytorch_model.pt}, text_encoder/, text_encoder_2/}, "
    "or that of diffusers: transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/; "
    "`hv-batch weights fetch` makes either."
)

MODEL = "hunyuan-video-t2v-720p"
CONVERTED = "model.safetensors"  # what `hv-batch weights convert` writes, or its index


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
        """One sentence for each file that is not there, with the path where it is expected; empty when complete. What
        a tree looks like is `LAYOUT`, to be told once beside them."""
        if not self.model_base.is_dir():
            return [f"model_base {self.model_base} is not a folder"]
        found: list[str] = []
        required = [("VAE config", self.vae_config)]
        for name, locate in (("DiT weights", self.dit_file), ("VAE weights", lambda: self.vae_weight)):
            try:
                file = locate()
                required += [(name, path) for path in ([file] if not file.is_file() else shard_files(file))]
            except UserError as error:
                found.append(str(error))
        found += [f"{name} missing: {path} is not there" for name, path in required if not path.is_file()]
        return found + missing_text_files(self.text_encoder, self.text_encoder_2, self.tokenizer, self.tokenizer_2)


def scales_file(dit_file: Path) -> Path:
    """Where the scales of FP8 weights lie: `x.pt` has `x_map.pt`, as released; `x.safetensors` `x_map.safetensors`."""
    stem = dit_file.name.removesuffix(INDEX_SUFFIX)
    path = dit_file.with_name(stem)
    return path.with_name(f"{path.stem}_map{path.suffix}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file, or UserError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there. {LAYOUT}") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}). {COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object and holds a {type(value).__name__}. {COPY_AGAIN}")
    return value


def _safetensors(folder: Path) -> Path | None:
    """The safetensors file of a folder, or the index of its shards, under our name or diffusers'."""
    names = [name + suffix for name in (CONVERTED, diffusers_layout.WEIGHTS) for suffix in (INDEX_SUFFIX, "")]
    return _first_file(folder, *names)


def _first_file(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
