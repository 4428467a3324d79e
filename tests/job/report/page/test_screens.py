"""The report page on narrow screens, for readers who want less motion, and as screenshots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.browser import wait_until
from tests.support.report_pages import READY, VIEWS

pytestmark = pytest.mark.slow


def test_no_view_is_wider_than_a_phone(browser, report_server):
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(report_server.url)
    wait_until(page, READY)
    for view in VIEWS:
        page.click(f"#to-{view}")
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
    page.click(".card a >> nth=0")
    page.wait_for_selector("dialog .facts")
    assert page.evaluate("document.querySelector('dialog').scrollWidth") <= 360
    context.close()


def test_no_video_plays_by_itself_for_a_reader_who_wants_less_motion(browser, report_server):
    for wanted, videos in (("reduce", 0), ("no-preference", 1)):
        context = browser.new_context(reduced_motion=wanted)
        page = context.new_page()
        page.goto(report_server.url)
        wait_until(page, READY)
        page.hover(".card:has(img) >> nth=0")
        page.wait_for_timeout(600)
        assert page.locator("video").count() == videos
        context.close()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_screenshots_of_all_views_at_three_widths(browser, report_server, tmp_path, scheme):
    """Look at them: HV_BATCH_SCREENSHOTS names the folder that keeps them."""
    folder = Path(os.environ.get("HV_BATCH_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for width, height in ((390, 844), (900, 1200), (1600, 1000)):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        page.goto(report_server.url)
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
