"""Builds the engine that a config names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from hv_batch.protocol import Engine, UserError


def build_engine(path: str, options: Mapping[str, Any]) -> Engine:
    """The engine named by import path (`package.module:Name`), constructed from the config's `model.options`.

    Raises UserError when there is no such engine or it refuses the options.
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
            f"model.options: the engine {path} does not know {', '.join(map(repr, unknown))}; allowed: "
            f"{', '.join(allowed)}."
        )
    try:
        return factory(**options)
    except TypeError as error:  # one that it needs is missing
        raise UserError(f"model.options: the engine {path} cannot be built: {error}. Add it to the config.") from error
