"""Read a LoRA file as a list of additions to the tensors of the released model.

Reading checks every key against the shapes of the model, from the header alone: a key that matches nothing is an error,
because a LoRA of another model would otherwise have no effect, or half of its effect, without a message.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hv_batch.engine.checkpoint.lora.alphas import AlphaRules, config_file, read_alpha_rules
from hv_batch.engine.checkpoint.lora.names import ModuleNames, ModulePart, plain_name, unsupported_kind
from hv_batch.engine.checkpoint.matching import PLAIN_DTYPES, Shapes, shortened
from hv_batch.engine.checkpoint.tensor_files import CPU, StoredTensor, named_tensors, open_file
from hv_batch.protocol import UserError

_DIGEST_CHUNK = 2**24

# Suffix of a key -> role of its tensor. `down` is A [rank, in], `up` is B [out, rank].
_ROLES: Mapping[str, str] = {
    ".lora_down.weight": "down",
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora.down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
    ".diff": "weight",
    ".diff_b": "bias",
}


@dataclass(frozen=True, slots=True)
class Addition:
    """What a LoRA adds to rows [start, stop) of one tensor, at strength 1."""

    tensor: str  # released name
    start: int
    stop: int
    file: Path
    key: str  # in the file, for messages
    factors: tuple[StoredTensor, ...]  # (up, down), or the difference itself
    scale: float = 1.0
    has_swapped_halves: bool = False

    def compute(self, device: torch.device) -> Tensor:
        """Return the addition on `device`, float32 [stop - start, ...]. Raises UserError if it is not finite."""
        parts = [factor.read(device, torch.float32) for factor in self.factors]
        delta = parts[0] if len(parts) == 1 else parts[0].flatten(1) @ parts[1].flatten(1) * self.scale
        if self.has_swapped_halves:
            delta = torch.cat(delta.chunk(2)[::-1])
        if not torch.isfinite(delta).all():
            raise UserError(
                f"The LoRA {self.file} contains NaN or infinity, or values that overflow, at {self.key}. It would turn "
                "every video black. Use another file, or train it again."
            )
        return delta


def open_adapter(path: Path, shapes: Shapes) -> list[Addition]:
    """Return the additions of a .safetensors file to a model whose tensors have `shapes`; reads no large tensor.

    Raises UserError, with the file and its keys, if the file cannot be read, is of an unsupported kind, or has a key
    or a shape that does not fit the model.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"The LoRA {path} is not a .safetensors file. Convert it, or give another file.")
    tensors = named_tensors(open_file(path), path)
    reader = _AdapterReader(path, tensors, ModuleNames(shapes), shapes, read_alpha_rules(path))
    return reader.additions()


def check_values(path: Path) -> None:
    """Raise UserError if a value of the file is not finite. Reads all of its tensors, one by one."""
    for key, tensor in named_tensors(open_file(path), path).items():
        if tensor.dtype in PLAIN_DTYPES and not torch.isfinite(tensor.read(CPU, tensor.dtype)).all():
            raise UserError(
                f"The LoRA {path} contains NaN or infinity at {key}. Every video would become black. Use another file, "
                "or train it again."
            )


def digest_adapter(path: Path) -> str:
    """Return the SHA-256 digest (hex) of the file, and of the adapter_config.json beside it if that is read.

    Raises UserError if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for each in (path, config_file(path)):
            if each is not None:
                with each.open("rb") as file:
                    while chunk := file.read(_DIGEST_CHUNK):
                        digest.update(chunk)
    except (OSError, ValueError) as error:
        raise UserError(f"The LoRA {path} cannot be read ({error}). Check its path and permissions.") from error
    return digest.hexdigest()


class _AdapterReader:
    """Matches the keys of one file. Collects all problems, so that one message has them all."""

    def __init__(
        self, path: Path, tensors: Mapping[str, StoredTensor], names: ModuleNames, shapes: Shapes, rules: AlphaRules
    ) -> None:
        self._path = path
        self._tensors = tensors
        self._names = names
        self._shapes = shapes
        self._rules = rules
        self._problems: defaultdict[str, list[str]] = defaultdict(list)

    def additions(self) -> list[Addition]:
        kinds = {kind for key in self._tensors if (kind := unsupported_kind(key))}
        if kinds:
            example = next(key for key in self._tensors if unsupported_kind(key))
            raise UserError(
                f"The LoRA {self._path} is of the kind {', '.join(sorted(kinds))} (key {example}), which is not "
                "supported; supported are plain LoRAs of the DiT with the keys of the official code, musubi-tuner, "
                "kohya, diffusion-pipe, ComfyUI, diffusers and finetrainers. Convert it, or give another file."
            )
        found = [addition for name, roles in self._modules().items() for addition in self._of_module(name, roles)]
        self._find_repeats(found)
        if self._problems:
            counts = [f"{len(keys)} {what} ({shortened(keys)})" for what, keys in self._problems.items()]
            raise UserError(
                f"The LoRA {self._path} does not fit this model. Keys: {'; '.join(counts)}. Give a LoRA of "
                "HunyuanVideo text-to-video, or check model.options.dit."
            )
        if not found:
            raise UserError(f"The LoRA {self._path} contains no LoRA: it has no keys. Give another file.")
        return found

    def _modules(self) -> dict[str, dict[str, str]]:
        """The keys of each module of the file, by role."""
        modules: dict[str, dict[str, str]] = {}
        for key, tensor in self._tensors.items():
            suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
            if suffix is None:
                self._problems["match no part of the model"].append(key)
            elif tensor.dtype not in PLAIN_DTYPES:
                dtype = str(tensor.dtype).removeprefix("torch.")
                self._problems["have a dtype that is not supported"].append(f"{key} is {dtype}")
            else:
                roles = modules.setdefault(key.removesuffix(suffix), {})
                if roles.setdefault(_ROLES[suffix], key) != key:
                    self._problems["repeat the part of another key"].append(key)
        return modules

    def _of_module(self, name: str, roles: Mapping[str, str]) -> Iterator[Addition]:
        part = self._names.find(name)
        if part is None:
            self._problems["match no part of the model"] += roles.values()
            return
        for role in ("weight", "bias"):
            if role in roles:
                yield from self._difference(part, role, roles[role])
        if "up" in roles and "down" in roles:
            yield from self._low_rank(name, part, roles)
        else:
            lone = [roles[role] for role in ("up", "down") if role in roles]
            lone += [roles["alpha"]] if "alpha" in roles and "weight" not in roles and not lone else []
            self._add("lack the other matrix of their pair", lone)

    def _low_rank(self, name: str, part: ModulePart, roles: Mapping[str, str]) -> Iterator[Addition]:
        up, down = self._tensors[roles["up"]], self._tensors[roles["down"]]
        target = self._target(part, "weight")
        rank = down.shape[0] if down.shape else 0
        columns = math.prod(target[1:])
        if len(target) < 2 or not rank or up.numel != target[0] * rank or up.shape[:2] != (target[0], rank):
            allowed = f"must be {[*target[:1], rank]}"
            self._add("have another shape", [f"{roles['up']} is {list(up.shape)}, {allowed}"])
        elif down.numel != rank * columns:
            allowed = f"must be {[rank, *target[1:]]}"
            self._add("have another shape", [f"{roles['down']} is {list(down.shape)}, {allowed}"])
        elif (scale := self._scale(name, rank, roles.get("alpha"))) is not None:
            yield Addition(
                f"{part.module}.weight",
                part.start,
                part.stop,
                self._path,
                roles["up"],
                (up, down),
                scale,
                part.has_swapped_halves,
            )

    def _difference(self, part: ModulePart, role: str, key: str) -> Iterator[Addition]:
        tensor, difference = f"{part.module}.{role}", self._tensors[key]
        if tensor not in self._shapes:
            self._problems["match no part of the model"].append(key)
        elif difference.shape != (target := self._target(part, role)):
            self._add("have another shape", [f"{key} is {list(difference.shape)}, must be {list(target)}"])
        else:
            yield Addition(
                tensor,
                part.start,
                part.stop,
                self._path,
                key,
                (difference,),
                has_swapped_halves=part.has_swapped_halves,
            )

    def _target(self, part: ModulePart, role: str) -> tuple[int, ...]:
        return (part.stop - part.start, *self._shapes[f"{part.module}.{role}"][1:])

    def _scale(self, name: str, rank: int, alpha_key: str | None) -> float | None:
        if alpha_key is None and self._rules.ranks and rank not in self._rules.ranks:
            self._add(
                f"have another rank than the {' or '.join(map(str, sorted(self._rules.ranks)))} of its config", [name]
            )
            return None
        if alpha_key is None:
            return self._rules.scale(plain_name(name), rank)
        tensor = self._tensors[alpha_key]
        alpha = float(tensor.read(CPU, torch.float32).reshape(-1)[0]) if tensor.numel == 1 else math.nan
        if not math.isfinite(alpha):
            self._add("are not one finite number", [alpha_key])
            return None
        return alpha / rank

    def _find_repeats(self, found: list[Addition]) -> None:
        """Two names of one part, such as the official and the diffusers name: only one can be meant."""
        seen: dict[tuple[str, int, int], Addition] = {}
        for addition in found:
            first = seen.setdefault((addition.tensor, addition.start, len(addition.factors)), addition)
            if first is not addition:
                self._problems["repeat the part of another key"].append(f"{addition.key}, like {first.key}")

    def _add(self, what: str, keys: list[str]) -> None:
        if keys:
            self._problems[what] += keys
