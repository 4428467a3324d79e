"""The report page: one self-contained HTML file that shows the documents of a report.

The files of this folder are the source of the page. `render_page` puts the styles, the scripts and the data into
`page.html`. There is no build step and no other dependency.

    page.html       the structure: header, navigation, one section for each view, the dialog of a sample
    *.css           styles, in the order of STYLES
    *.js            scripts, in the order of SCRIPTS; they share one scope

All documents are untrusted, also those that the page fetches later: prompts, ids and messages may contain anything.
`documents.js` coerces every field and checks every key before it becomes a URL, all texts become text nodes, and the
content security policy allows no script but this one. The policy has hashes, because the page may come from a disk.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from string import Template
from typing import Any

STYLES = ("page.css", "videos.css", "sample.css", "charts.css")
SCRIPTS = (
    "documents.js",
    "format.js",
    "dom.js",
    "address.js",
    "parts.js",
    "results.js",
    "filters.js",
    "card.js",
    "grid.js",
    "command.js",
    "record.js",
    "sample.js",
    "failures.js",
    "charts.js",
    "tables.js",
    "timeline.js",
    "overview.js",
    "app.js",
)

# Characters that could end the script element, begin a comment in it, or end a line of a script.
_UNSAFE = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def render_page(report: Mapping[str, Any], first: Sequence[Mapping[str, Any]]) -> str:
    """Return the page as HTML, in ASCII.

    `report` is the document report.json, `first` are the first samples in the order of the plan, as in a part. Raises
    ValueError if one of them has a number that is not finite.
    """
    style, script = _join(STYLES), f'(() => {{\n"use strict";\n{_join(SCRIPTS)}\n}})();\n'
    data = json.dumps({**report, "first": list(first)}, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)
    title = f"{report.get('name') or 'Report'} - hv_batch"
    page = Template(_read("page.html")).substitute(
        policy=html.escape(_policy(style, script)), title=_ascii(title), style=style, script=script, data=data
    )
    return page


def _policy(style: str, script: str) -> str:
    """The content security policy of the page.

    On a page from a disk, some browsers do not count its folder as 'self', hence `file:`. Pages from a server cannot
    load such URLs. Trusted types make an assignment of text to `innerHTML` an error.
    """
    media = "'self' file:"
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            f"img-src {media}",
            f"media-src {media}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _ascii(text: str) -> str:
    """The text for an HTML element. It may contain lone surrogates, which have no other form in ASCII."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return html.escape(printable).encode("ascii", "xmlcharrefreplace").decode()


@cache
def _join(names: Sequence[str]) -> str:
    return "\n".join(map(_read, names))


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
