"""The links of the documentation lead somewhere, and the README stays short."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support.repository import ROOT

README_LINES = 150

PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if not name.startswith("tests/support/data/")  # cards of fixture roots
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            path, _, anchor = target.partition("#")
            there = page.parent / path
            assert there.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in anchors(there.read_text("utf-8")), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    """Paths in code quotes, as `tests/job/test_crash_points.py`; a schema such as `hv_batch/commit/1` is no path."""
    named = re.findall(r"`((?:hv_batch|tests|configs|cluster|jobs)/[\w/.-]+)`", page.read_text("utf-8"))
    assert not [path for path in named if not (ROOT / path).exists() and not re.search(r"/\d+$", path)]


def test_every_page_is_linked_from_another():
    text = {page: page.read_text("utf-8") for page in PAGES}
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", text[page])
        if not target.startswith("http")
    }
    assert not [str(page) for page in PAGES if page.resolve() not in linked and page != ROOT / "README.md"]


def test_the_readme_is_read_in_ten_minutes():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
