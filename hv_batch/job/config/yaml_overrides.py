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

# Limits of a YAML document, far above any config. A document of 1 kB may refer to its own parts by aliases so often
# that it stands for billions of values. PyYAML takes quadratic time for deep nesting, and Python for long numbers.
MAX_CONFIG_BYTES = 1 << 17
MAX_YAML_DEPTH = 100
MAX_YAML_VALUES = 100_000  # with every alias counted as what it refers to
EXCERPT_CHARS = 100  # of the line with an error
MAX_NUMBER_CHARS = 4000  # Python converts at most 4,300 digits


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys (PyYAML keeps the last one) and reads 1e-3 as a number.

    It refuses nesting beyond MAX_YAML_DEPTH while it scans, which PyYAML does in quadratic time.
    """

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803 (a name of PyYAML)
        self._check_depth()
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        self._check_depth()
        return bool(super().add_indent(column))

    def _check_depth(self) -> None:
        if self.flow_level + len(self.indents) > MAX_YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=self.get_mark())

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node. PyYAML raises errors of many classes for a tag whose text is not of its form."""
        try:
            return super().construct_object(node, deep)
        except (IndexError, KeyError, AttributeError, OverflowError) as error:
            problem = f"it is not a valid {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

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


class YamlError(ValueError):
    """A text is not valid YAML. The message has one line; `excerpt` shows the place with a caret, if it is known."""

    def __init__(self, message: str, excerpt: str = "") -> None:
        super().__init__(message)
        self.excerpt = excerpt


def parse_yaml(content: bytes | str) -> Any:
    """The value of a YAML document. Raises YamlError with the problem and its position."""
    if len(content) > MAX_CONFIG_BYTES:
        raise YamlError(f"it has {len(content)} bytes; at most {MAX_CONFIG_BYTES} are allowed")
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise _located(error, content) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-45
        raise YamlError(" ".join(str(error).split())) from error


def _located(error: yaml.MarkedYAMLError, content: bytes | str) -> YamlError:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or "it cannot be read"
    if mark is None:
        return YamlError(problem)
    message = f"{problem} at line {mark.line + 1}, column {mark.column + 1}"
    if error.context and error.context_mark:
        message += f" ({error.context} that begins at line {error.context_mark.line + 1})"
    lines = (content.decode("utf-8", "replace") if isinstance(content, bytes) else content).splitlines()
    if mark.line >= len(lines):
        return YamlError(message)
    start = max(0, mark.column - EXCERPT_CHARS // 2)
    number = f"  {mark.line + 1} | "
    shown = lines[mark.line][start : start + EXCERPT_CHARS].replace("\t", " ")
    return YamlError(message, f"{number}{shown}\n{' ' * (len(number) + mark.column - start)}^")


def _count_values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """The number of values that a node stands for. `known` has those of the nodes that were counted.

    Raises ValueError if there are too many, if a node contains itself, or if a number is too long.
    """
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise yaml.MarkedYAMLError(problem="an alias refers to what contains it", problem_mark=node.start_mark)
        return count
    known[id(node)] = None  # it is being counted
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    elif node.tag.endswith((":int", ":float")) and len(node.value) > MAX_NUMBER_CHARS:
        problem = f"a number has {len(node.value)} characters; at most {MAX_NUMBER_CHARS} are allowed"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    count = 1 + sum(_count_values(part, known) for part in below)
    if count > MAX_YAML_VALUES:
        problem = f"it stands for more than {MAX_YAML_VALUES} values; write lists and objects without aliases"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    known[id(node)] = count
    return count


def apply_override(values: dict[Any, Any], override: str) -> None:
    """Set one `a.b=value` in `values`. Raises ValueError if the override cannot be parsed."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ValueError(f"override {shorten(override)}; allowed: key=value with a dotted key, as groups.count=4")
    try:
        value = _parse_override(text.strip())
    except (ValueError, yaml.YAMLError) as error:
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
    node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
    _count_values(node, {})
    return loader.construct_object(node)


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
