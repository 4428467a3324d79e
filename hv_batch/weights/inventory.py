"""Inspect a checkpoint: its parts, their sizes, dtypes and widths, and its problems.

Only headers are read, not tensors, so the 40 GB of the released checkpoint take seconds. A deep inspection reads all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hv_batch.architecture import DiTConfig, check_fields
from hv_batch.engine.checkpoint.digests import revision
from hv_batch.engine.checkpoint.json_files import read_json
from hv_batch.engine.checkpoint.loading import open_dit, open_vae, vae_config, verify, verify_dit
from hv_batch.engine.checkpoint.tensor_files import Tensors, shard_files
from hv_batch.engine.checkpoint.text_files import weight_file
from hv_batch.engine.checkpoint.towers import CLIP_TYPES, LLAMA_TYPES, open_tower, text_config
from hv_batch.engine.checkpoint.tree import LAYOUT, MODEL, CheckpointTree, scales_file
from hv_batch.protocol import UserError
from hv_batch.weights.deep_check import find_damage, find_non_finite
from hv_batch.weights.distilled import Recognition, find_dit, recognize

FP8_FILE = "mp_rank_00_model_states_fp8.pt"


@dataclass(frozen=True, slots=True)
class Part:
    """One model of a checkpoint."""

    name: str
    path: str
    files: int
    nbytes: int  # on disk
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]  # number of parameters by dtype
    note: str


@dataclass(frozen=True, slots=True)
class Inventory:
    path: str
    layout: str
    parts: list[Part]
    problems: list[str]
    revision: dict[str, str] | None  # digest of each part, as in the identity of a run; None if there are problems
    distilled: Recognition | None = None  # the distilled weights that these seem to be

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> str:
        lines = [f"{self.path}  ({self.layout})"]
        for part in self.parts:
            dtypes = ", ".join(f"{dtype} {100 * count / part.parameters:.0f} %" for dtype, count in part.dtypes.items())
            files = f" in {part.files} files" if part.files > 1 else ""
            lines += [
                f"  {part.name:<15} {part.parameters:>15,} parameters  {_size(part.nbytes):>9}{files}  {dtypes}",
                f"  {'':<15} {part.path}: {part.note}",
            ]
        lines += [f"  note: {self.distilled.render()}"] if self.distilled else []
        lines += [f"  problem: {problem}" for problem in self.problems]
        if self.revision:
            lines += ["  revision", *(f"    {part:<15} {digest}" for part, digest in self.revision.items())]
        else:
            lines.append("  no revision, because the checkpoint is not complete")
        return "\n".join(lines)


def take_inventory(path: Path, load_key: str = "module", *, deep: bool = False) -> Inventory:
    """Inspect a model_base in either layout, or a DiT file or folder.

    With `deep`, all weights are read: checksums of .pt files, sizes of safetensors files, and values that are not
    finite. Raises UserError if there is no checkpoint.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a model_base, or a DiT file or folder.")
    tree = CheckpointTree(path, load_key=load_key)
    if not tree.dit_file().is_file() and (other := find_dit(path)):
        tree = CheckpointTree(path, dit_weight=other, load_key=load_key)
    if not (tree.is_diffusers or (path / MODEL).is_dir()):
        alone = CheckpointTree(path.parent, dit_weight=path, load_key=load_key)
        if path.is_dir() and not any(path.glob("*.pt")) and not any(path.glob("*.safetensors*")):
            raise UserError(f"{path} is not a model_base and has no DiT weights. {LAYOUT}")
        parts, problems = _collect(path, {"DiT": lambda: _dit(alone)}, deep)
        problems = [*problems, *(verify_dit(alone, _config(alone)) if parts else [])]
        return Inventory(str(path), "a DiT alone", parts, problems, None, recognize(path, _dit_file(alone)))

    openers: dict[str, Callable[[], tuple[Path, Tensors, str]]] = {"DiT": lambda: _dit(tree)}
    fp8 = CheckpointTree(path, dit_weight=path / MODEL / "transformers" / FP8_FILE, load_key=load_key)
    has_fp8 = fp8.dit_file().is_file()
    if has_fp8:
        openers["DiT, FP8"] = lambda: _dit(fp8)
    openers["VAE"] = lambda: (tree.vae_weight, open_vae(tree), _widths(vae_config(tree).block_out_channels))
    openers["LLaMA"] = lambda: _tower(tree.text_encoder, LLAMA_TYPES)
    openers["CLIP"] = lambda: _tower(tree.text_encoder_2, CLIP_TYPES)
    parts, broken = _collect(path, openers, deep)
    problems = tree.missing() or [*broken, *(verify(tree, _config(tree)) if len(parts) == len(openers) else [])]
    if has_fp8 and len(parts) == len(openers) and not tree.missing():
        problems = list(dict.fromkeys([*problems, *verify_dit(fp8, _config(fp8))]))
    layout = "diffusers' layout" if tree.is_diffusers else "the released layout"
    digests = None if problems else revision(tree)
    return Inventory(str(path), layout, parts, problems, digests, recognize(path, _dit_file(tree)))


def dit_widths(tensors: Tensors) -> dict[str, Any]:
    """Return the fields of `DiTConfig` that follow from the tensor shapes. Raises KeyError if this is not a DiT.

    The shapes do not determine how the channels of a head are split over time, height and width. `rope_dim_list` is the
    released split if the head has the released size, else an arbitrary valid one.
    """
    shape = {name: tensor.shape for name, tensor in tensors.items()}
    hidden, in_channels, *patch = shape["img_in.proj.weight"]
    norm = next((name for name in shape if name.endswith("q_norm.weight")), "")
    head_dim = shape[norm][0]
    mlp = next((shape[name][0] for name in shape if name.endswith("img_mlp.fc1.weight")), None)
    if mlp is None:
        mlp = shape["single_blocks.0.linear1.weight"][0] - 3 * hidden
    return {
        "in_channels": in_channels,
        "out_channels": shape["final_layer.linear.weight"][0] // (patch[0] * patch[1] * patch[2]),
        "patch_size": tuple(patch),
        "hidden_size": hidden,
        "heads_num": hidden // head_dim,
        "mlp_width_ratio": mlp / hidden,
        "mm_double_blocks_depth": _depth(shape, "double_blocks."),
        "mm_single_blocks_depth": _depth(shape, "single_blocks."),
        "rope_dim_list": DiTConfig().rope_dim_list if head_dim == 128 else (head_dim - 4, 2, 2),
        "text_states_dim": shape["txt_in.input_embedder.weight"][1],
        "text_states_dim_2": shape["vector_in.in_layer.weight"][1],
        "guidance_embed": "guidance_in.mlp.0.weight" in shape,
        "refiner_depth": _depth(shape, "txt_in.individual_token_refiner.blocks."),
    }


def _config(tree: CheckpointTree) -> DiTConfig:
    """Return the expected config of the DiT: from its config.json, else from its shapes, else the released one.

    Raises UserError if config.json is not valid.
    """
    if options := tree.dit_options():
        return DiTConfig(**options)
    try:
        widths = dit_widths(open_dit(tree))
        check_fields(DiTConfig, widths, "")
        return DiTConfig(**widths)
    except (UserError, KeyError, IndexError, TypeError, ValueError, ArithmeticError):
        return DiTConfig()


def _dit_file(tree: CheckpointTree) -> Path | None:
    try:
        return tree.dit_file()
    except UserError:  # a folder without one DiT, which is among the problems
        return None


def _dit(tree: CheckpointTree) -> tuple[Path, Tensors, str]:
    tensors = open_dit(tree)
    config = _config(tree)
    width = (
        f"width {config.hidden_size}, {config.heads_num} heads, {config.mm_double_blocks_depth} double and "
        f"{config.mm_single_blocks_depth} single blocks"
    )
    if config == DiTConfig():
        return tree.dit_file(), tensors, f"{width}, as released"
    origin = "from its config.json" if tree.dit_options() else "not as released: the engine needs the option `dit`"
    return tree.dit_file(), tensors, f"{width}; {origin}"


def _tower(folder: Path, model_types: tuple[str, ...]) -> tuple[Path, Tensors, str]:
    tensors = open_tower(folder, model_types)
    config = text_config(read_json(folder / "config.json"), folder / "config.json")
    path = weight_file(folder)
    assert path is not None
    return path, tensors, f"{config.get('num_hidden_layers', '?')} layers, width {config.get('hidden_size', '?')}"


def _collect(
    base: Path, openers: Mapping[str, Callable[[], tuple[Path, Tensors, str]]], deep: bool
) -> tuple[list[Part], list[str]]:
    parts, problems = [], []
    for name, open_part in openers.items():
        try:
            path, tensors, note = open_part()
            parts.append(_part(name, base, path, tensors, note))
        except UserError as error:
            problems.append(str(error))
            continue
        if deep:
            damage = list(find_damage(_weight_files(path)))
            problems += damage or find_non_finite(tensors, path)
    return parts, problems


def _part(name: str, base: Path, path: Path, tensors: Tensors, note: str) -> Part:
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    files = [path, *(file for file in _weight_files(path) if file != path)]
    return Part(
        name=name,
        path=str(path.relative_to(base)) if path != base and path.is_relative_to(base) else path.name,
        files=len(files),
        nbytes=sum(file.stat().st_size for file in files),
        tensors=len(tensors),
        parameters=dtypes.total(),
        dtypes=dict(dtypes.most_common()),
        note=note,
    )


def _weight_files(path: Path) -> list[Path]:
    """Return the files of a part that hold tensors: the file itself or its shards, and the scales of FP8 weights."""
    return [file for file in (*shard_files(path), scales_file(path)) if file.is_file()]


def _depth(names: Mapping[str, Any], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
    return len(numbers)


def _widths(channels: tuple[int, ...]) -> str:
    return f"widths {', '.join(map(str, channels))}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
