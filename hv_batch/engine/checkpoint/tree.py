"""Checkpoint trees: the paths of their files, and a check for missing files.

The released layout, and the safetensors that `hv-batch weights convert` writes:

model_base/
  hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt    {"module": tensors}, optionally {"ema": tensors}
                                   or model.safetensors, or model.safetensors.index.json and its shards
                                      ..._map.pt or .safetensors     the scales, if the weights are FP8
                                      config.json                    only if the widths are not those of the release
  hunyuan-video-t2v-720p/vae/config.json, pytorch_model.pt           or model.safetensors
  text_encoder/                                                     the LLaMA language model and its tokenizer
  text_encoder_2/                                                   CLIP ViT-L/14 and its tokenizer

`hv_batch.engine.checkpoint.diffusers_layout` describes the layout of diffusers. A tree in this layout is detected by
its files.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hv_batch.architecture import DIT_CLASS, DiTConfig, check_fields
from hv_batch.engine.checkpoint import diffusers_layout
from hv_batch.engine.checkpoint.json_files import read_json
from hv_batch.engine.checkpoint.tensor_files import INDEX_SUFFIX, shard_files
from hv_batch.engine.checkpoint.text_files import missing_text_files
from hv_batch.protocol import UserError

LAYOUT = (
    "The layout is <model_base>/{hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt, "
    "hunyuan-video-t2v-720p/vae/{config.json,pytorch_model.pt}, text_encoder/, text_encoder_2/}, "
    "or that of diffusers: transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/; "
    "`hv-batch weights fetch` downloads either."
)

MODEL = "hunyuan-video-t2v-720p"
CONVERTED = "model.safetensors"  # written by `hv-batch weights convert`, as one file or as shards with an index


@dataclass(frozen=True, slots=True)
class CheckpointTree:
    """The paths of one checkpoint.

    `dit_weight` replaces the default DiT file by another file, or by a folder that contains one. `load_key` is the key
    of the set of tensors in that file, "module" or "ema".
    """

    model_base: Path
    dit_weight: Path | None = None
    load_key: str = "module"

    @property
    def is_diffusers(self) -> bool:
        """Whether the tree has the layout of diffusers."""
        return diffusers_layout.is_diffusers_tree(self.model_base)

    @property
    def _vae(self) -> Path:
        return self.model_base / "vae" if self.is_diffusers else self.model_base / MODEL / "vae"

    @property
    def vae_config(self) -> Path:
        return self._vae / "config.json"

    @property
    def vae_weight(self) -> Path:
        """The file of the VAE. If none exists, the default path."""
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
        """Return the file that holds the DiT's tensors, or the index of its shards. The file need not exist.

        If `dit_weight` is a folder, the order is that of the official loader: `pytorch_model_<load_key>.pt`, then the
        `*_model_states.pt` of DeepSpeed, then safetensors. Raises UserError if the folder contains none or several.
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
        content = "several: " + ", ".join(file.name for file in files) if files else "none of these"
        raise UserError(
            f"dit_weight is the folder {self.dit_weight}, which must contain {bare.name} or one *_model_states.pt (or "
            f"{CONVERTED}, or {CONVERTED}{INDEX_SUFFIX}) but contains {content}. Set dit_weight to the file itself."
        )

    def dit_options(self) -> dict[str, Any]:
        """Return the fields of `DiTConfig` that the config.json beside the DiT's weights sets; empty without a file.

        Raises UserError if the file is damaged, has a field of the wrong type, or belongs to another model.
        """
        try:
            path = self.dit_file().with_name("config.json")
        except UserError:  # `missing` reports it
            return {}
        if not path.is_file():
            return {}
        values = read_json(path)
        if self.is_diffusers or values.get("_class_name") == diffusers_layout.DIT_CLASS:
            options = diffusers_layout.dit_options(values, path)
        elif values.get("_class_name") == DIT_CLASS:
            options = {key: values[key] for key in values if key != "_class_name"}
        else:  # a config.json of another class is ignored
            return {}
        allowed = [field.name for field in fields(DiTConfig)]
        if unknown := [key for key in options if key not in allowed]:
            raise UserError(
                f"{path}: {', '.join(map(repr, unknown[:5]))} is not a field of this model's DiT; allowed are "
                f"{', '.join(allowed)}. Remove it."
            )
        check_fields(DiTConfig, options, str(path))
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        try:
            DiTConfig(**options)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return options

    def missing(self) -> list[str]:
        """Return one sentence for each missing file, with its expected path; empty if the tree is complete.

        The caller adds `LAYOUT` once to the message.
        """
        if not self.model_base.is_dir():
            return [f"model_base {self.model_base} is not a folder"]
        sentences: list[str] = []
        required = [("VAE config", self.vae_config)]
        for name, locate in (("DiT weights", self.dit_file), ("VAE weights", lambda: self.vae_weight)):
            try:
                file = locate()
                required += [(name, path) for path in ([file] if not file.is_file() else shard_files(file))]
            except UserError as error:
                sentences.append(str(error))
        sentences += [f"{name} missing: {path} does not exist" for name, path in required if not path.is_file()]
        return sentences + missing_text_files(self.text_encoder, self.text_encoder_2, self.tokenizer, self.tokenizer_2)


def scales_file(dit_file: Path) -> Path:
    """Return the path of the scales of FP8 weights: `x_map.pt` for `x.pt`, `x_map.safetensors` for `x.safetensors`."""
    stem = dit_file.name.removesuffix(INDEX_SUFFIX)
    path = dit_file.with_name(stem)
    return path.with_name(f"{path.stem}_map{path.suffix}")


def _safetensors(folder: Path) -> Path | None:
    """Return the safetensors file of a folder, or the index of its shards, under hv_batch's or diffusers' name."""
    names = [name + suffix for name in (CONVERTED, diffusers_layout.WEIGHTS) for suffix in (INDEX_SUFFIX, "")]
    return _first_file(folder, *names)


def _first_file(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
