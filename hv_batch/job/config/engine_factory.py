"""Constructs the engine that a config names.

A config that comes from an output root is data that anyone with access to the bucket can write. It may name only
engines of an allow-list (`refuse_unknown_engine`): an import path is code that this process executes.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from typing import Any

from hv_batch.job.config.sections import ENGINE
from hv_batch.protocol import Engine, UserError

# The engines of this package. Its other classes are not engines, so the prefix `hv_batch.` alone is not enough.
OWN_ENGINES = frozenset(
    {ENGINE, "hv_batch.bench.sleep_engine:SleepEngine", "hv_batch.bench.gloo_sleep_engine:GlooSleepEngine"}
)
ENTRY_POINTS = "hv_batch.engines"  # the group in which installed packages announce their engines
VARIABLE = "HV_BATCH_ENGINES"  # further import paths, separated by commas

MODEL_BASE_REMEDY = (
    " model_base is a checkpoint: `hv-batch weights fetch DIR` downloads the released one, and `hv-batch toy DIR` "
    "writes the toy for demo_cpu.yaml and fake_gpus_8rank.yaml and prints its path."
)
METHODS = tuple(name for name in vars(Engine) if not name.startswith("_"))


def refuse_unknown_engine(path: str, output: str, named: Collection[str] = ()) -> None:
    """Refuse the engine `path` of the run.json of `output`, unless it is ours, installed as an engine, or named.

    `named` are the import paths that the operator gives, on the command line or in a config file. Raises UserError.
    """
    from_environment = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    if path in OWN_ENGINES or path in named or path in from_environment:
        return
    if any(entry.value == path for entry in entry_points(group=ENTRY_POINTS)):
        return
    raise UserError(
        f"The run.json of {output} names the engine {path}, which is not known here. Whoever can write to an output "
        f"root could have written it, so it is not imported. If it is your engine, name it with --engine {path}, in "
        f"the environment variable {VARIABLE}, or as an entry point of the group {ENTRY_POINTS}; or run the command "
        "that started the run, whose config names it."
    )


def build_engine(path: str, options: Mapping[str, Any]) -> Engine:
    """Import the engine at `path` (`package.module:Name`) and construct it with `ModelConfig.engine_options`.

    Raises UserError if the engine cannot be imported, is not a class with the methods of `Engine`, or refuses the
    options.
    """
    module_name, _, name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The engine {path} of the config's model.engine cannot be imported: {error}. Give the import path of an "
            "engine that is installed where the actors run, as package.module:Name."
        ) from error
    if problem := _engine_problem(factory):
        raise UserError(
            f"model.engine = {path} is no engine: it {problem}. Give the import path of a class that implements "
            f"hv_batch.protocol.Engine, or omit model.engine for {ENGINE}."
        )
    parameters = {name: one for name, one in inspect.signature(factory).parameters.items() if name != "self"}
    allowed = list(parameters)
    if "loras" in options and "loras" not in allowed:
        raise UserError(f"model.loras: the engine {path} does not support LoRAs. Remove model.loras from the config.")
    if unknown := [name for name in options if name not in allowed]:
        raise UserError(
            f"model.options: the engine {path} has no option {', '.join(map(repr, unknown))}; allowed: "
            f"{', '.join(allowed)}."
        )
    required = [name for name, one in parameters.items() if one.default is one.empty and one.kind not in _VARIADIC]
    if missing := [name for name in required if name not in options]:
        raise UserError(
            f"model.options: the engine {path} requires {' and '.join(missing)}, which the config does not set. Add "
            f"{' '.join(f'model.options.{name}=VALUE' for name in missing)} to the command, or the keys to the config."
            f"{MODEL_BASE_REMEDY if path == ENGINE else ''}"
        )
    build: Any = factory
    try:
        engine: Engine = build(**options)
    except TypeError as error:
        raise UserError(f"model.options: the engine {path} cannot be built: {error}.") from error
    return engine


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _engine_problem(factory: object) -> str | None:
    """Why `factory` is no engine, as the rest of a sentence; None if it may be one."""
    if not inspect.isclass(factory):
        return f"is not a class but a {type(factory).__name__}"
    missing = [method for method in METHODS if not callable(getattr(factory, method, None))]
    if missing:
        return f"is a class without the methods {', '.join(missing)}"
    if inspect.isabstract(factory) or getattr(factory, "_is_protocol", False):
        return "is an interface, which has no code"
    return None
