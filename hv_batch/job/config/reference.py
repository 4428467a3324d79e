"""Prints configs/README.md: the guide, then every key of the config with its docstring.

    python -m hv_batch.job.config.reference > configs/README.md

The guide is guide.md.in, whose links are relative to configs/. A test checks that the file is up to date and that every
key has a docstring.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hv_batch.job.config.field_rules import ROW_RULES
from hv_batch.job.config.run_config import RunConfig

_TYPES = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text", dict: "mapping", list: "list"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def render_reference() -> str:
    """The text of configs/README.md."""
    guide = resources.files("hv_batch.job.config").joinpath("guide.md.in").read_text("utf-8")
    return "\n".join([guide, *_lines()])


def key_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The docstring of each key of a section, as one line; keys without one are left out."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    docstrings = {}
    for field, text in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docstrings[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return docstrings


def subsections(schema: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The keys of a model that are sections, each with its model."""
    annotations = {name: field.annotation for name, field in schema.model_fields.items()}
    return {
        name: section
        for name, section in annotations.items()
        if isinstance(section, type) and issubclass(section, BaseModel)
    }


def _lines() -> Iterator[str]:
    yield "## All keys"
    yield ""
    yield "Generated from the models in `hv_batch/job/config`. `seed`, `gpu` and `gpu_memory_gib` have no section."
    yield ""
    sections = subsections(RunConfig)
    yield from _table(RunConfig, [name for name in RunConfig.model_fields if name not in sections])
    for name, section in sections.items():
        yield f"### {name}"
        yield ""
        yield " ".join((section.__doc__ or "").split())
        yield ""
        yield from _table(section, list(section.model_fields))


def _table(section: type[BaseModel], names: list[str]) -> Iterator[str]:
    docstrings = key_docstrings(section)
    yield "| key | values | default | description |"
    yield "|---|---|---|---|"
    for name in names:
        field = section.model_fields[name]
        default = json.dumps(field.get_default(), ensure_ascii=False)
        yield f"| `{name}` | {values_of(name, field)} | `{default}` | {docstrings[name]} |"
    yield ""


def values_of(name: str, field: FieldInfo) -> str:
    """The type and the bounds of a key. The bounds of the keys of a manifest row are those of `ROW_RULES`."""
    if name in ROW_RULES:
        return ROW_RULES[name][1]
    return _type_name(field.annotation) + _in_brackets(field.metadata)


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "`null`"
    if origin is Annotated:
        return _type_name(arguments[0]) + _in_brackets(arguments[1:])
    if origin is Literal:
        return _one_of([f"`{value}`" for value in arguments])
    if origin in (Union, UnionType):
        return _one_of([_type_name(argument) for argument in arguments])
    return _TYPES[origin or annotation]


def _one_of(values: Sequence[str]) -> str:
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def _in_brackets(metadata: Iterable[Any]) -> str:
    bounds = ", ".join(_bounds(metadata))
    return f" ({bounds})" if bounds else ""


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for each in metadata:
        if isinstance(each, FieldInfo):
            yield from _bounds(each.metadata)
        yield from (f"{text} {getattr(each, bound):g}" for bound, text in _BOUNDS.items() if hasattr(each, bound))


if __name__ == "__main__":
    print(render_reference(), end="")
