"""Checks of the values of engine options, which come from untrusted YAML. They raise UserError for a wrong value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hv_batch.architecture import check_fields
from hv_batch.protocol import UserError

T = TypeVar("T")


def parse_path(option: str, value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise UserError(f"engine option {option}: {value!r} is not a path; give the path of a file or folder.")
    return Path(value).expanduser().absolute()


def parse_choice(option: str, value: str, allowed: Iterable[str]) -> str:
    if value not in list(allowed):  # a list, because a value from YAML may be unhashable
        raise UserError(f"engine option {option}: {value!r} is not allowed; allowed are {', '.join(allowed)}.")
    return value


def parse_fields(
    config_class: type[T], options: Mapping[str, Any], name: str, base: Mapping[str, Any] | None = None
) -> T:
    """Build a config dataclass from `base`, which is checked, updated with the untrusted `options`.

    YAML lists become tuples. Raises UserError if a name is unknown or a value is not allowed.
    """
    allowed = [field.name for field in fields(config_class)]  # type: ignore[arg-type]
    if not isinstance(options, Mapping):
        raise UserError(
            f"engine option {name}: {options!r} must map names to values; allowed names are {', '.join(allowed)}."
        )
    values = {**(base or {}), **options}
    if unknown := [key for key in values if key not in allowed]:
        raise UserError(
            f"engine option {name}: unknown {', '.join(map(repr, unknown))}; allowed are {', '.join(allowed)}."
        )
    check_fields(config_class, options, f"engine option {name}")
    return config_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def to_json(values: dict[str, Any]) -> dict[str, Any]:
    """Convert tuples to lists, so that an identity is equal after a JSON round trip."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
