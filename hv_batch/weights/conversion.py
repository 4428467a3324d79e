"""Any checkpoint the engine loads, rewritten as safetensors in the released layout: bf16 or FP8, one tensor at a time.

Sources are a whole model_base in either layout, which becomes a whole model_base, or a DiT file or folder alone, which
becomes a folder that `dit_weight` may name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hv_batch.architecture import DIT_CLASS
from hv_batch.engine.checkpoint.diffusers_layout import released_vae_config
from hv_batch.engine.checkpoint.digests import digest_file
from hv_batch.engine.checkpoint.loading import (
    CLIP_TYPES,
    LLAMA_TYPES,
    Tensors,
    open_dit,
    open_scales,
    open_tower,
    open_vae,
)
from hv_batch.engine.checkpoint.tensor_files import CPU, StoredTensor, shard_files
from hv_batch.engine.checkpoint.text_files import weight_file
from hv_batch.engine.checkpoint.tree import CONVERTED, LAYOUT, MODEL, CheckpointTree, read_json, scales_file
from hv_batch.engine.dit.fp8_storage import FP8, dequantise, quantise
from hv_batch.protocol import UserError
from hv_batch.weights.shards import SHARD_BYTES, OnBytes, ignore_bytes, write_file, write_sharded, write_text

_STEM = CONVERTED.removesuffix(".safetensors")
_TOWER_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # what of a text tower is no weights


@dataclass(frozen=True, slots=True)
class Recipe:
    """What becomes of the DiT; the VAE and the text towers keep their numbers.

    `dtype` None keeps every tensor's own (FP8 weights become bfloat16). With `fp8` the Linears inside the blocks become
    FP8 with one scale each, as released; those that are stay as they are.
    """

    dtype: torch.dtype | None = None
    fp8: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` is about to write, known without reading a tensor."""

    target: Path
    nbytes: int
    run: Callable[[OnBytes], None]


def plan_conversion(source: Path, target: Path, recipe: Recipe, load_key: str = "module") -> Conversion:
    """A conversion that is ready to run; running it again after an interruption goes on where it was.

    Raises UserError when the source is incomplete or damaged, lies where the target would, or the disk is too small.
    """
    if not source.exists():
        raise UserError(f"{source} is not there. Name a model_base, or a DiT file or folder.")
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise UserError(f"The destination {target} lies in the source {source}. Choose another folder.")
    tree = CheckpointTree(source, load_key=load_key)
    if tree.is_diffusers or (source / MODEL).is_dir():
        if missing := tree.missing():
            raise UserError("The source is not complete: " + " | ".join([*missing, LAYOUT]))
        parts = [
            _dit(tree, target / MODEL / "transformers", recipe),
            _vae(tree, target / MODEL / "vae"),
            _tower(tree.text_encoder, tree.tokenizer, target / "text_encoder", LLAMA_TYPES),
            _tower(tree.text_encoder_2, tree.tokenizer_2, target / "text_encoder_2", CLIP_TYPES),
        ]
    else:
        parts = [_dit(CheckpointTree(source.parent, dit_weight=source, load_key=load_key), target, recipe)]
    whole = Conversion(target, sum(part.nbytes for part in parts), lambda on_bytes: _run_all(parts, on_bytes))
    _refuse_small_disk(whole)
    return whole


def convert(
    source: Path, target: Path, recipe: Recipe, on_bytes: OnBytes = ignore_bytes, load_key: str = "module"
) -> None:
    """Plan and run; `on_bytes` is told of progress."""
    plan_conversion(source, target, recipe, load_key).run(on_bytes)


def _run_all(parts: list[Conversion], on_bytes: OnBytes) -> None:
    for part in parts:
        part.run(on_bytes)


def _dit(tree: CheckpointTree, folder: Path, recipe: Recipe) -> Conversion:
    path = tree.dit_file()
    original = open_dit(tree)
    tensors, scales = _recast(original, open_scales(path, original), recipe)
    source = files_origin(path, f"{tree.load_key} {recipe.dtype} {'fp8' if recipe.fp8 else ''}")
    index = folder / f"{CONVERTED}.index.json"

    def run(on_bytes: OnBytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if options := tree.dit_options():
            write_text(folder / "config.json", json.dumps({"_class_name": DIT_CLASS, **options}, indent=1) + "\n")
        write_map = partial(write_file, scales_file(index), scales, source) if scales else lambda: None
        write_sharded(folder, _STEM, tensors, source, on_bytes, before_index=write_map, shard_bytes=recipe.shard_bytes)

    return Conversion(folder, _nbytes(tensors), run)


def _vae(tree: CheckpointTree, folder: Path) -> Conversion:
    tensors = open_vae(tree)
    config = read_json(tree.vae_config)
    told = released_vae_config(config) if tree.is_diffusers else config

    def run(on_bytes: OnBytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(told, indent=1) + "\n")
        write_file(folder / CONVERTED, tensors, files_origin(tree.vae_weight, ""), on_bytes)

    return Conversion(folder, _nbytes(tensors), run)


def _tower(weights: Path, tokenizer: Path, folder: Path, model_types: tuple[str, ...]) -> Conversion:
    """A text tower with its tokenizer beside it. Safetensors are linked, which costs no space, or copied."""
    tensors = open_tower(weights, model_types)
    file = weight_file(weights)
    assert file is not None
    shards = shard_files(file)
    is_safe = all(shard.suffix == ".safetensors" for shard in shards)

    def run(on_bytes: OnBytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for origin in dict.fromkeys((weights, tokenizer)):
            for path in sorted(origin.iterdir()):
                is_index = path.name.endswith(".index.json")
                if path.is_file() and path.suffix in _TOWER_SUFFIXES and not is_index:
                    link_or_copy(path, folder / path.name)
        if not is_safe:
            write_sharded(folder, "model", tensors, files_origin(file, ""), on_bytes)
            return
        for shard in dict.fromkeys((*shards, file)):
            link_or_copy(shard, folder / shard.name)
        on_bytes(_nbytes(tensors))

    return Conversion(folder, _nbytes(tensors), run)


def link_or_copy(source: Path, target: Path) -> None:
    """The same bytes at `target`, whole or not at all: by a hard link where the file system has them."""
    draft = target.with_name(f".{target.name}.part")
    draft.unlink(missing_ok=True)
    original = source.resolve()  # a hub's cache holds symbolic links
    try:
        os.link(original, draft)
    except OSError:
        shutil.copyfile(original, draft)
    draft.replace(target)
    draft.unlink(missing_ok=True)  # of two links to one file, POSIX renames none


def _recast(tensors: Tensors, scales: Tensors, recipe: Recipe) -> tuple[Tensors, Tensors]:
    """The tensors as they shall be written, and the scales of those that shall be FP8."""
    written: Tensors = {}
    kept: Tensors = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in scales and recipe.fp8:
            written[name], kept[module] = tensor, scales[module]
        elif module in scales:
            written[name] = _dequantised(tensor, scales[module], recipe.dtype or torch.bfloat16)
        elif recipe.fp8 and _is_quantised_by_the_release(name, tensor):
            written[name], kept[module] = _quantised(tensor)
        else:
            written[name] = _cast(tensor, recipe.dtype)
    return written, kept


def _is_quantised_by_the_release(name: str, tensor: StoredTensor) -> bool:
    """The weights of the blocks' Linears are their only matrices."""
    return name.startswith(("double_blocks.", "single_blocks.")) and len(tensor.shape) == 2


def _cast(tensor: StoredTensor, dtype: torch.dtype | None) -> StoredTensor:
    return tensor if dtype is None or not tensor.dtype.is_floating_point else replace(tensor, dtype=dtype)


def _dequantised(weight: StoredTensor, scale: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    def read(device: torch.device, asked: torch.dtype) -> Tensor:
        scalar = scale.read(device, scale.dtype).reshape(())
        return dequantise(weight.read(device, weight.dtype), scalar, dtype).to(asked)

    return replace(weight, dtype=dtype, read=read)


def _quantised(weight: StoredTensor) -> tuple[StoredTensor, StoredTensor]:
    """FP8 weight and scale. The scale is remembered when the weight is written, and found again when it was not."""
    known: list[float] = []  # numbers, because a small tensor between two large ones would hold the heap's pages

    def quantise_once() -> Tensor:
        values, scale = quantise(weight.read(CPU, torch.float32))
        known[:] = [scale.item()]
        return values

    def read_scale(device: torch.device, dtype: torch.dtype) -> Tensor:
        if not known:
            quantise_once()
        return torch.tensor(known[0], dtype=torch.float32).to(device, dtype)

    values = replace(weight, dtype=FP8, read=lambda device, dtype: quantise_once().to(device, dtype))
    return values, StoredTensor((), torch.float32, read_scale)


def files_origin(path: Path, how: str) -> str:
    """What tells one source from another: a digest of its files (as `digests.revision` reads them), and how."""
    digest = hashlib.sha256()
    for number, file in enumerate([*shard_files(path), scales_file(path)]):
        if file.is_file():
            digest_file(digest, str(number), file)
    return f"{digest.hexdigest()} {how}".strip()


def _refuse_small_disk(conversion: Conversion) -> None:
    folder = conversion.target
    while not folder.exists():
        folder = folder.parent
    written = sum(path.stat().st_size for path in conversion.target.rglob("*.safetensors"))
    needed, free = conversion.nbytes - written, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{conversion.target} needs {needed / 1e9:.1f} GB more, and its disk has {free / 1e9:.1f} GB free. Choose "
            "another destination, or make room."
        )


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
