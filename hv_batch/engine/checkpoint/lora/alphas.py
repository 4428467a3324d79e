"""The scale of each low-rank pair of a LoRA file: alpha / rank.

Alpha comes from the first of these that has it:

1. a tensor `<module>.alpha` in the file (official, musubi-tuner, kohya, some files for ComfyUI);
2. the entry `lora_adapter_metadata` of the file's header (diffusers);
3. `adapter_config.json` beside the file (PEFT, diffusion-pipe);
4. alpha = rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hv_batch.engine.checkpoint.json_files import read_json
from hv_batch.protocol import UserError

METADATA_KEY = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"

# Options of PEFT that change the weights and are not supported, with the value that has no effect.
_MUST_BE = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "alora_invocation_tokens": None,
}


@dataclass(frozen=True, slots=True)
class AlphaRules:
    """The alphas of a file that are not among its tensors."""

    alpha: float | None = None  # None: alpha = rank
    by_module: Mapping[str, float] = field(default_factory=dict)  # `alpha_pattern` of PEFT
    is_rank_stabilised: bool = False  # alpha / sqrt(rank), "rsLoRA"
    ranks: frozenset[int] = frozenset()  # that the file should have; empty: unknown

    def scale(self, module: str, rank: int) -> float:
        """Return alpha / rank for a module, by its name in the file without prefixes."""
        alphas = (value for name, value in self.by_module.items() if module == name or module.endswith(f".{name}"))
        alpha = next(alphas, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def config_file(path: Path) -> Path | None:
    """Return the `adapter_config.json` that belongs to a LoRA file, or None if there is none or it is not read."""
    beside = path.with_name(CONFIG_FILE)
    return beside if METADATA_KEY not in _metadata(path) and beside.is_file() else None


def read_alpha_rules(path: Path) -> AlphaRules:
    """Read the rules of a .safetensors file. Raises UserError if they are damaged or use an unsupported option."""
    metadata = _metadata(path)
    if METADATA_KEY in metadata:
        try:
            values = json.loads(metadata[METADATA_KEY])
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: {METADATA_KEY} in its header is not JSON ({error}). Save the file again."
            ) from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: {METADATA_KEY} in its header is not an object. Save the file again.")
        prefix = "transformer."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        return _parse(own or values, f"{path}: {METADATA_KEY}")  # a transformer saved alone has no prefixes
    if (beside := config_file(path)) is not None:
        return _parse(read_json(beside), str(beside))
    return AlphaRules()


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _parse(values: Mapping[str, Any], where: str) -> AlphaRules:
    if wrong := [name for name, none in _MUST_BE.items() if values.get(name, none) not in (none, None)]:
        raise UserError(f"{where}: {wrong[0]} = {values[wrong[0]]!r} is not supported. Use a plain LoRA.")
    patterns = values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{where}: alpha_pattern must map names of modules to numbers. Save the file again.")
    alpha = values.get("lora_alpha")
    for name, value in {"lora_alpha": alpha, **patterns}.items():
        if not _is_finite(value) and not (name == "lora_alpha" and value is None):
            raise UserError(f"{where}: {name} = {value!r}; allowed: a finite number. Save the file again.")
    by_module = {name.removeprefix("^"): value for name, value in patterns.items()}
    rank_pattern = values.get("rank_pattern")
    given = [values.get("r"), *(rank_pattern.values() if isinstance(rank_pattern, dict) else ())]
    ranks = frozenset(rank for rank in given if isinstance(rank, int))
    return AlphaRules(alpha, by_module, bool(values.get("use_rslora")), ranks)


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
