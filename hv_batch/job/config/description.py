"""Describes configs and their keys: where each value comes from, and what a key means."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from hv_batch.job.config.reference import key_docstrings, subsections, values_of
from hv_batch.job.config.retired_keys import replace_retired
from hv_batch.job.config.run_config import RunConfig, build_config, read_values
from hv_batch.job.redaction import public_values
from hv_batch.protocol import UserError

OPTIONS = "model.options"  # a mapping of the engine, whose keys are shown one by one


@dataclass(frozen=True, slots=True)
class Value:
    """One resolved key of a config. `source` is "override", "file" or "default"."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class Key:
    """The documentation of one key."""

    key: str
    allowed: str
    default: str  # as JSON
    text: str


def resolve_values(url: str, overrides: Sequence[str]) -> list[Value]:
    """Every key of a config with its value, without secrets, and where the value comes from.

    Raises UserError as `load_config`.
    """
    values = read_values(url)
    in_file = set(_leaves(replace_retired(dict(values))))
    given = {override.partition("=")[0].strip() for override in overrides}
    config = public_values(build_config(url, values, overrides).model_dump(mode="json"))

    def source(key: str) -> str:
        if any(key == name or key.startswith(f"{name}.") for name in given):
            return "override"
        return "file" if any(key == name or key.startswith(f"{name}.") for name in in_file) else "default"

    return [Value(key, value, source(key)) for key, value in _leaves(config).items()]


def explain_key(key: str) -> list[Key]:
    """The documentation of a dotted key, or of all keys of a section. Raises UserError if there is no such key."""
    keys = list(_keys(RunConfig))
    found = [one for one in keys if one.key == key or one.key.startswith(f"{key}.")]
    if not found and key.startswith(f"{OPTIONS}."):
        return explain_key(OPTIONS)
    if not found:
        found = [one for one in keys if one.key.rpartition(".")[2] == key]
    if not found:
        last = {one.key.rpartition(".")[2] for one in keys}
        near = difflib.get_close_matches(key, [*(one.key for one in keys), *last], n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Sections: {', '.join(RunConfig.model_fields)}."
        raise UserError(f"The config has no key {key}. {hint}")
    return found


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    below, docstrings = subsections(section), key_docstrings(section)
    for name, field in section.model_fields.items():
        if name in below:
            yield from _keys(below[name], f"{prefix}{name}.")
        else:
            default = json.dumps(field.get_default(), ensure_ascii=False, default=str)
            yield Key(f"{prefix}{name}", values_of(name, field).replace("`", ""), default, docstrings[name])


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values below `values` by dotted key. Only sections and the engine's options are divided."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and (not prefix or key == OPTIONS):
            leaves |= _leaves(value, f"{key}.")
        else:
            leaves[key] = value
    return leaves
