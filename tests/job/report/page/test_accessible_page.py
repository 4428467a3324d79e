"""The report page for everybody: contrast in both colour schemes, headings, names, motion, narrow screens."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from hv_batch.bench.report_page.server import serve
from hv_batch.bench.report_page.synthetic import SyntheticReport, synthetic_samples
from hv_batch.bench.report_page.synthetic_root import write_root
from tests.support.browser import wait_until

VIEWS = ("failures", "history", "run", "videos")
READY = "document.querySelectorAll('.card .id').length > 0"

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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("accessible")
    documents = SyntheticReport(list(synthetic_samples(400, videos=2, committed=0.8)), running=True)
    write_root(root, documents, clip_bytes=2_000_000)
    with serve(root) as running:
        yield running


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_every_text_has_the_contrast_of_level_aa_and_headings_are_in_order(browser, server, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(server.url)
    wait_until(page, READY)
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
    context.close()


@pytest.mark.slow
def test_no_view_is_wider_than_a_phone(browser, server):
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(server.url)
    wait_until(page, READY)
    for view in VIEWS:
        page.click(f"#to-{view}")
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
    page.click(".card a >> nth=0")
    page.wait_for_selector("dialog .facts")
    assert page.evaluate("document.querySelector('dialog').scrollWidth") <= 360
    context.close()


@pytest.mark.slow
def test_no_video_plays_by_itself_for_a_reader_who_wants_less_motion(browser, server):
    for wanted, videos in (("reduce", 0), ("no-preference", 1)):
        context = browser.new_context(reduced_motion=wanted)
        page = context.new_page()
        page.goto(server.url)
        wait_until(page, READY)
        page.hover(".card:has(img) >> nth=0")
        page.wait_for_timeout(600)
        assert page.locator("video").count() == videos
        context.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_screenshots_of_all_views_at_three_widths(browser, server, tmp_path, scheme):
    """Look at them: HV_BATCH_SCREENSHOTS names the folder that keeps them."""
    folder = Path(os.environ.get("HV_BATCH_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for width, height in ((390, 844), (900, 1200), (1600, 1000)):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        page.goto(server.url)
        for view in VIEWS:
            page.click(f"#to-{view}")
            page.wait_for_timeout(400)
            page.screenshot(path=folder / f"{view}-{width}-{scheme}.png", full_page=view != "videos")
        page.click(".card a >> nth=1")
        page.wait_for_selector("dialog .facts")
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"sample-{width}-{scheme}.png")
        context.close()
    assert len(list(folder.glob(f"*-{scheme}.png"))) >= 15
    assert all(each.stat().st_size > 10_000 for each in folder.glob("*.png"))
