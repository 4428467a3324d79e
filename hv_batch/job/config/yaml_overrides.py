"""Parses the YAML of a config and its `key=value` overrides, and turns pydantic's errors into messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from hv_batch.job.user_input import shorten

CROSS_FIELD = "cross_field"  # error type of a check over several keys; its message names the keys


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys (PyYAML keeps the last one) and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(content: bytes | str) -> Any:
    """The value of a YAML document. Raises ValueError with the problem and its position."""
    try:
        return yaml.load(content, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-45
        raise ValueError(" ".join(str(error).split())) from error


def apply_override(values: dict[Any, Any], override: str) -> None:
    """Set one `a.b=value` in `values`. Raises ValueError if the override cannot be parsed."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ValueError(f"override {shorten(override)}; allowed: key=value with a dotted key, as groups.count=4")
    try:
        value = _parse_override(text.strip())
    except ValueError as error:
        raise ValueError(f"override {shorten(override)}: the value is not valid YAML ({error})") from error
    for name in path[:-1]:
        below = {} if values.get(name) is None else values[name]
        if not isinstance(below, dict):
            raise ValueError(f"override {shorten(override)}: {name} holds {shorten(below)}, which has no keys below it")
        values[name] = dict(below)  # a copy: sections joined by a YAML alias are one object
        values = values[name]
    values[path[-1]] = value


def _parse_override(text: str) -> Any:
    if text[:1] in ("{", "[", '"', "'"):
        return parse_yaml(text)
    # Anything else is one scalar: a prompt may contain ": " or " #", which have a meaning in a YAML document.
    if not text:
        return ""
    loader = _Loader("")
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


def explain(schema: type[BaseModel], details: ErrorDetails) -> str:
    """One line for one of pydantic's errors: the dotted key, its value and what is allowed."""
    error_type, loc = details["type"], details["loc"]
    key = ".".join(map(str, loc))
    if error_type == CROSS_FIELD:
        return details["msg"]
    if error_type == "extra_forbidden":
        return f"{key}: unknown key. {_suggest(schema, loc)}"
    if error_type == "value_error":
        allowed = str(details["ctx"]["error"])
    elif error_type == "model_type":
        allowed = f"a mapping of the keys {known_keys(_section_at(schema, loc))}"
    else:
        allowed = details["msg"].removeprefix("Input should be ")
    return f"{key} = {shorten(details['input'])}; allowed: {allowed}"


def _suggest(schema: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """The most similar key of the section; if there is none, keys of this name in other sections; else all its keys."""
    section, name = _section_at(schema, loc[:-1]), str(loc[-1])
    similar = difflib.get_close_matches(name, section.model_fields, n=1)
    if similar:
        return f"Did you mean {'.'.join([*map(str, loc[:-1]), similar[0]])}?"
    elsewhere = [dotted for dotted in _dotted_keys(schema) if dotted.rpartition(".")[2] == name]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere)}?"
    return f"Known keys here: {known_keys(section)}."


def _section_at(schema: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    for part in loc:
        schema = _subsection(schema, str(part)) or schema
    return schema


def _subsection(schema: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = schema.model_fields.get(name)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in schema.model_fields:
        below = _subsection(schema, name)
        if below:
            yield from _dotted_keys(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def known_keys(schema: type[BaseModel]) -> str:
    return ", ".join(schema.model_fields)
