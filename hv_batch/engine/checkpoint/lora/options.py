"""Parse the engine option `loras`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hv_batch.engine.checkpoint.lora.merge import LoraFile
from hv_batch.protocol import UserError
from hv_batch.sampling_params import LORA_NAME, MAX_LORA_STRENGTH, NO_LORA


def parse_loras(option: Mapping[str, Any]) -> dict[str, LoraFile]:
    """Return the LoRA files by name, in the order of the names, with absolute paths.

    A value is a path, or a mapping of `path` and, optionally, `strength`. Raises UserError for anything else.
    """
    if not isinstance(option, Mapping):
        raise UserError(f"engine option loras: {option!r} must map names to files.")
    return {name: _parse_entry(name, option[name]) for name in sorted(option, key=str)}


def _parse_entry(name: object, value: object) -> LoraFile:
    if not isinstance(name, str) or not LORA_NAME.fullmatch(name) or name == NO_LORA:
        raise UserError(
            f"engine option loras: {name!r} is not allowed as a name; allowed are at most 64 letters, digits, '.', '_' "
            f"and '-', and not {NO_LORA!r}."
        )
    entry = {"path": value} if isinstance(value, str | Path) else value
    if not isinstance(entry, Mapping) or not entry.keys() <= {"path", "strength"} or not entry.get("path"):
        raise UserError(f"engine option loras.{name}: {value!r} must have a path, and may have a strength.")
    path, strength = entry["path"], entry.get("strength", 1.0)
    if not isinstance(path, str | Path):
        raise UserError(f"engine option loras.{name}: {path!r} is not a path; give the path of a .safetensors file.")
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not is_number or not abs(strength) <= MAX_LORA_STRENGTH:
        raise UserError(
            f"engine option loras.{name}: strength {strength!r} is not allowed; allowed is a number from "
            f"-{MAX_LORA_STRENGTH:g} to {MAX_LORA_STRENGTH:g}."
        )
    return LoraFile(Path(path).expanduser().absolute(), float(strength))
