"""Pages of reports in Chromium: roots, a server, and what every page must fulfil."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hv_batch.bench.report_page.server import CountingServer, serve
from hv_batch.bench.report_page.synthetic import SyntheticReport, synthetic_samples
from hv_batch.bench.report_page.synthetic_root import write_root
from hv_batch.job import layout
from hv_batch.job.report.page import render_page
from tests.support.browser import wait_until

VIEWS = ("failures", "history", "run", "videos")

# Expressions for `wait_until`.
READY = "document.querySelectorAll('.card .id').length > 0"
SHOWN = "document.querySelector('#shown').textContent"
POSTERS = "[...document.images].filter((image) => image.naturalWidth > 0).length"

# The contrast ratio of WCAG 2.2 of every visible text with the background behind it: texts below their limit.
LOW_CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const over = ([r, g, b, a = 1], back) => [r, g, b].map((c, i) => c * a + back[i] * (1 - a));
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      layers.push(colour);
      if ((colour[3] ?? 1) === 1) break;
    }
    return layers.reverse().reduce((back, colour) => over(colour, back), [255, 255, 255]);
  };
  const low = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (node.closest("script, style, noscript, .quiet")) continue;
    const style = getComputedStyle(node), back = behind(node);
    const paint = node.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(over(channels(paint), back)), luminance(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) low.push(`${ratio.toFixed(2)} ${node.outerHTML.slice(0, 100)}`);
  }
  return low;
}"""
HEADINGS = (
    "[...document.querySelectorAll('h1, h2, h3, h4')].filter((h) => h.checkVisibility()).map((h) => +h.tagName[1])"
)
UNNAMED = """[...document.querySelectorAll('a[href], button, input, select, summary, video[controls], [tabindex="0"]')]
  .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.labels?.[0]?.textContent.trim() || e.textContent.trim()))
  .map((e) => e.outerHTML.slice(0, 100))"""


def first_shard() -> list[dict[str, Any]]:
    return list(synthetic_samples(250, videos=2))


@pytest.fixture(scope="module")
def report_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10,000 videos of 20 MB, two for each prompt. Only the first shard has its media and records."""
    root = tmp_path_factory.mktemp("report")
    documents = SyntheticReport(list(synthetic_samples(10_000, videos=2)), running=True)
    write_root(root, SyntheticReport(first_shard()))
    for name, part in {"report.json": documents.report, **documents.parts}.items():
        (root / "report" / name).write_text(json.dumps(part))
    (root / layout.REPORT).write_text(render_page(documents.report, documents.first))
    return root


@pytest.fixture(scope="module")
def report_server(report_root: Path) -> Iterator[CountingServer]:
    with serve(report_root) as running:
        yield running


@contextmanager
def opened(browser: Any, url: str, *, width: int = 1280, height: int = 800, wait: str = READY, **options: Any) -> Any:
    """The page in a window of its own. Errors of scripts and refusals of the content security policy fail the test."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
    page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())
    try:
        page.goto(url)
        if wait:
            wait_until(page, wait)
        yield page
        assert not faults
    finally:
        context.close()


def check_access(page: Any) -> None:
    """Contrast of level AA, a name for everything that takes the focus, and headings in order, in all views."""
    for view in (*VIEWS, "sample"):
        page.click(f"#to-{view}" if view != "sample" else ".card a >> nth=1")
        if view == "sample":
            page.wait_for_selector("dialog .facts")
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        assert page.evaluate(LOW_CONTRAST) == [], view
        assert page.evaluate(UNNAMED) == [], view
        levels = page.evaluate(HEADINGS)
        assert levels[0] == 1, view
        assert all(later - earlier <= 1 for earlier, later in pairwise(levels)), (view, levels)
