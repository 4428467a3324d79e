"""A config is untrusted text: parsing it takes linear time, whatever it contains (P6)."""

from __future__ import annotations

import pytest

from hv_batch.job.config.run_config import load_config
from hv_batch.job.config.yaml_overrides import MAX_CONFIG_BYTES, parse_yaml
from hv_batch.protocol import UserError


def nested(first, line):
    return "\n".join([f"a0: &a0 {first}", *(line(f"a{n}", f"*a{n - 1}") for n in range(1, 12))])


BOMBS = {
    "aliases": (
        nested("[x, x]", lambda name, below: f"{name}: &{name} [{', '.join([below] * 9)}]"),
        "more than 100000",
    ),
    "merges": (
        nested("{k: 1}", lambda name, below: f"{name}: &{name} {{<<: [{', '.join([below] * 9)}]}}"),
        "more than",
    ),
    "recursion": ("a: &a [*a]", "an alias refers to what contains it"),
    "brackets": ("[" * 50_000, "nested too deeply"),
    "dashes": ("- " * 50_000, "nested too deeply"),
    "base 60": ("seed: 1" + ":1" * 50_000, "a number has 100001 characters; at most 4000 are allowed"),
    "size": ("#" * (MAX_CONFIG_BYTES + 1), f"at most {MAX_CONFIG_BYTES} are allowed"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_a_document_that_stands_for_too_much_is_refused(tmp_path, name):
    """The nested aliases stand for 31 billion values."""
    text, message = BOMBS[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(path))
    path.write_text("seed: 1")
    if len(text) < 2000:
        with pytest.raises(UserError, match="is not valid YAML"):
            load_config(str(path), ["model.options={" + ", ".join(text.splitlines()) + "}"])


def test_aliases_may_be_used():
    """A config may share a section, and a long number is not a long text."""
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
    assert parse_yaml("prompt: '" + "1" * 5000 + "'") == {"prompt": "1" * 5000}
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    "value",
    ["!!int ''", "!!float _", "!!bool x", "!!timestamp x", "1" + ":1" * 300 + ".5", "{a: !!int ''}", "[!!bool '']"],
)
def test_a_tag_whose_text_is_not_of_its_form_is_reported_with_its_place(tmp_path, value):
    """P6: PyYAML raises IndexError, KeyError, AttributeError and OverflowError for these."""
    path = tmp_path / "config.yaml"
    path.write_text(f"seed: {value}")
    with pytest.raises(UserError, match=r"not a valid (int|float|bool|timestamp) at line 1, column \d"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("value", "shown"),
    [("{2026-11-29: a}", r"\{datetime.date"), ("{!!binary aGk= : a}", "b'hi'"), ("0x" + "f" * 3900, r"\(int\)")],
)
def test_a_value_that_json_has_not_is_shown_in_the_message(tmp_path, value, shown):
    """P6: YAML has keys and numbers that JSON has not."""
    path = tmp_path / "config.yaml"
    path.write_text(f"seed: {value}")
    with pytest.raises(UserError, match=rf"seed = .*{shown}.*; allowed: a whole number"):
        load_config(str(path))
