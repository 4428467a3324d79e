"""configs/README.md documents every key of the config, from the models themselves."""

from __future__ import annotations

import re

import pytest

from hv_batch.job.config.reference import key_docstrings, render_reference, subsections
from hv_batch.job.config.run_config import RunConfig
from tests.support.repository import CONFIGS

SECTIONS = {"": RunConfig, **subsections(RunConfig)}


def test_the_reference_is_up_to_date():
    """After a change of a key or of the guide: python -m hv_batch.job.config.reference > configs/README.md"""
    assert (CONFIGS / "README.md").read_text("utf-8") == render_reference()


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_has_a_docstring(name):
    """The reference has no empty cell, and every section says what it is for."""
    section, documented = SECTIONS[name], key_docstrings(SECTIONS[name])
    keys = set(section.model_fields) - (SECTIONS.keys() if section is RunConfig else set())
    assert {key for key in keys if not documented.get(key)} == set()
    assert section.__doc__


def test_every_key_has_a_row_with_its_values_and_default():
    """Bounds inside a union, such as those of a key that may be null, are documented as well."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| `(.*?)` \|", (CONFIGS / "README.md").read_text("utf-8"), re.MULTILINE)
    keys = [key for section in SECTIONS.values() for key in section.model_fields if key not in SECTIONS]
    assert sorted(key for key, *_ in rows) == sorted(keys)
    values = {key: (allowed, default) for key, allowed, default in rows}
    assert values["height"] == ("a multiple of 16 from 16 to 8192", "720")
    assert values["ulysses_degree"] == ("whole number (at least 1, at most 10000) or `null`", "null")
    assert values["codec"] == ("`h264`, `h265` or `av1`", '"h264"')
    assert values["webdataset"] == ("`true` or `false`", "false")


def test_the_guide_names_every_shipped_config():
    """A reader finds the config for a situation in the table at the top."""
    text = (CONFIGS / "README.md").read_text("utf-8")
    linked = set(re.findall(r"\]\((\w+\.yaml)\)", text))
    assert linked == {path.name for path in CONFIGS.glob("*.yaml")}
