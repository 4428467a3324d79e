"""Convert any checkpoint that the engine loads to safetensors in the released layout, one tensor at a time.

The source is a model_base in either layout, which is converted to a model_base, or a single DiT file or folder, which
is converted to a folder that can be used as `dit_weight`.
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
from hv_batch.engine.checkpoint.json_files import read_json
from hv_batch.engine.checkpoint.loading import open_dit, open_scales, open_vae
from hv_batch.engine.checkpoint.tensor_files import CPU, StoredTensor, Tensors, shard_files
from hv_batch.engine.checkpoint.text_files import weight_file
from hv_batch.engine.checkpoint.towers import CLIP_TYPES, LLAMA_TYPES, open_tower
from hv_batch.engine.checkpoint.tree import CONVERTED, LAYOUT, MODEL, CheckpointTree, scales_file
from hv_batch.engine.dit.fp8_storage import FP8, dequantise, quantise
from hv_batch.protocol import UserError
from hv_batch.weights.shards import SHARD_BYTES, OnBytes, ignore_bytes, write_file, write_sharded, write_text

_STEM = CONVERTED.removesuffix(".safetensors")
_TOWER_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # files of a text tower other than weights


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the DiT is converted. The tensors of the VAE and of the text towers are not changed.

    If `dtype` is None, each tensor keeps its dtype, except that FP8 weights become bfloat16. With `fp8`, the weights of
    the Linear layers inside the blocks become FP8 with one scale each, as in the released FP8 file; weights that are
    FP8 already are not changed.
    """

    dtype: torch.dtype | None = None
    fp8: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Conversion:
    """A planned conversion: its target, its size in bytes, and the function that runs it. No tensor is read yet."""

    target: Path
    nbytes: int
    run: Callable[[OnBytes], None]


def plan_conversion(source: Path, target: Path, recipe: Recipe, load_key: str = "module") -> Conversion:
    """Return a conversion that is ready to run. A conversion that was interrupted resumes when it is run again.

    Raises UserError if the source is incomplete or damaged, if the target is inside the source, or if the disk is too
    small.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist. Give a model_base, or a DiT file or folder.")
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise UserError(f"The target {target} is inside the source {source}. Choose another folder.")
    tree = CheckpointTree(source, load_key=load_key)
    if tree.is_diffusers or (source / MODEL).is_dir():
        if missing := tree.missing():
            raise UserError("The source is incomplete: " + " | ".join([*missing, LAYOUT]))
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
    """Plan and run a conversion. `on_bytes` is called with the number of bytes of each tensor that is done."""
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
    released = released_vae_config(config) if tree.is_diffusers else config

    def run(on_bytes: OnBytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(released, indent=1) + "\n")
        write_file(folder / CONVERTED, tensors, files_origin(tree.vae_weight, ""), on_bytes)

    return Conversion(folder, _nbytes(tensors), run)


def _tower(weights: Path, tokenizer: Path, folder: Path, model_types: tuple[str, ...]) -> Conversion:
    """Plan the conversion of a text tower and its tokenizer. Safetensors files are hard-linked if possible."""
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
    """Hard-link `source` to `target`, or copy it if the file system has no hard links. `target` is never incomplete."""
    draft = target.with_name(f".{target.name}.part")
    draft.unlink(missing_ok=True)
    original = source.resolve()  # the files of a hub cache are symbolic links
    try:
        os.link(original, draft)
    except OSError:
        shutil.copyfile(original, draft)
    draft.replace(target)
    draft.unlink(missing_ok=True)  # POSIX rename does nothing if both names are links to the same file


def _recast(tensors: Tensors, scales: Tensors, recipe: Recipe) -> tuple[Tensors, Tensors]:
    """Return the tensors to write, and the scales of those that become FP8."""
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
    """Return whether the tensor is a Linear weight of a block; these are the only matrices of the blocks."""
    return name.startswith(("double_blocks.", "single_blocks.")) and len(tensor.shape) == 2


def _cast(tensor: StoredTensor, dtype: torch.dtype | None) -> StoredTensor:
    return tensor if dtype is None or not tensor.dtype.is_floating_point else replace(tensor, dtype=dtype)


def _dequantised(weight: StoredTensor, scale: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    def read(device: torch.device, asked: torch.dtype) -> Tensor:
        scalar = scale.read(device, scale.dtype).reshape(())
        return dequantise(weight.read(device, weight.dtype), scalar, dtype).to(asked)

    return replace(weight, dtype=dtype, read=read)


def _quantised(weight: StoredTensor) -> tuple[StoredTensor, StoredTensor]:
    """Return the FP8 weight and its scale.

    The scale is cached when the weight is read, and computed from the weight if that was skipped.
    """
    known: list[float] = []  # a number: a small tensor allocated between two large ones would fragment the heap

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
    """Return an identifier of the source: a digest of its files (read as in `digests.revision`), followed by `how`."""
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
            f"{conversion.target} needs {needed / 1e9:.1f} GB more, but its disk has {free / 1e9:.1f} GB free. Choose "
            "another target, or free disk space."
        )


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
