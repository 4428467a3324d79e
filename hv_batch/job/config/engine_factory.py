"""Constructs the engine that a config names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from hv_batch.protocol import Engine, UserError


def build_engine(path: str, options: Mapping[str, Any]) -> Engine:
    """Import the engine at `path` (`package.module:Name`) and construct it with the config's `model.options`.

    Raises UserError if the engine cannot be imported or refuses the options.
    """
    module_name, _, name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The engine {path} of the config's model.engine cannot be imported: {error}. Give the import path of an "
            "engine that is installed where the actors run, as package.module:Name."
        ) from error
    allowed = [name for name in inspect.signature(factory).parameters if name != "self"]
    if unknown := [name for name in options if name not in allowed]:
        raise UserError(
            f"model.options: the engine {path} has no option {', '.join(map(repr, unknown))}; allowed: "
            f"{', '.join(allowed)}."
        )
    try:
        return factory(**options)
    except TypeError as error:  # a required option is missing
        raise UserError(f"model.options: the engine {path} cannot be built: {error}. Add it to the config.") from error
