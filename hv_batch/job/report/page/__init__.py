"""The report page: one self-contained HTML file. This version only holds the data."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

# Characters that could end the script element, or begin a comment in it.
_UNSAFE = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def render_page(report: Mapping[str, Any], first: Sequence[Mapping[str, Any]]) -> str:
    """Return the page as HTML. `report` is the document report.json, `first` are samples of parts."""
    data = json.dumps({**report, "first": list(first)}, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)
    title = html.escape(str(report["name"]))
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>\n'
        f'<script type="application/json" id="report">{data}</script>\n'
    )
