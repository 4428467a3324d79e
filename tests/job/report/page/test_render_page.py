"""The report page as a file: one document that holds its data, whatever the texts in it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.report.page import render_page
from tests.support.report_documents import ATTACKS, hostile_report, json_values

DATA = re.compile(r'<script type="application/json" id="report">(.*?)</script>', re.S)


def embedded(page):
    return DATA.search(page)[1]


@settings(max_examples=20)
@given(st.dictionaries(st.text(max_size=8), json_values(), max_size=5), st.lists(json_values(), max_size=3))
def test_the_embedded_documents_are_those_of_the_report_and_contain_no_markup(report, first):
    data = embedded(render_page(report, first))
    assert json.loads(data) == {**report, "first": first}
    assert not set("<>&") & set(data)
    assert data.isascii()


def test_hostile_texts_add_no_element():
    documents = hostile_report()
    page = render_page(documents.report, documents.first)
    plain = render_page({}, [])
    assert len(re.findall("<[a-zA-Z!/]", page)) == len(re.findall("<[a-zA-Z!/]", plain))


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_hostile_name_stays_in_the_title(name):
    title = re.search("<title>(.*?)</title>", render_page({"name": name}, []), re.S)[1]
    assert "<" not in title
    assert html.unescape(title).endswith(" - hv_batch")


def test_a_lone_surrogate_in_a_text_does_not_stop_the_page():
    assert render_page({"name": "a\ud800"}, [{"prompt": "\udfff"}]).encode()


def test_the_policy_allows_exactly_the_styles_and_the_script_of_the_page():
    page = render_page({}, [])
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        source = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert not re.search(r"""https?://(?!www\.w3\.org/2000/svg")""", page), "the page names no other host"


def test_a_number_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        render_page({"eta_s": float("nan")}, [])
