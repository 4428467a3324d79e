"""More of the report page in a real browser: records, commands, refreshes, wrong documents."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from hv_batch.job import layout
from hv_batch.job.report.page import render_page
from tests.support.browser import wait_until
from tests.support.report_documents import misshapen_report
from tests.support.report_pages import POSTERS, READY, SHOWN, VIEWS, first_shard, opened

pytestmark = pytest.mark.slow


def test_the_grid_has_as_many_elements_at_the_end_as_at_the_beginning(browser, report_server):
    with opened(browser, report_server.url) as page:
        wait_until(page, f"{POSTERS} >= 6")
        before = page.evaluate("document.querySelectorAll('*').length")
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        wait_until(page, "[...document.querySelectorAll('.card')].some((card) => card.ariaPosInSet === '10000')")
        wait_until(page, "document.querySelectorAll('.card a[href]').length > 3")
        assert page.evaluate("document.querySelectorAll('*').length") < 1.5 * before
        assert "report/parts/shard-00039.json" in report_server.requests
        assert "report/parts/shard-00020.json" not in report_server.requests, "a jump fetches only what is visible"


def test_a_sample_has_its_whole_record_the_videos_of_its_prompt_and_a_command(browser, report_server):
    with opened(browser, f"{report_server.url}#sample=tram-000001.v1&shard=0") as page:
        page.wait_for_selector("dialog .facts")
        assert page.text_content("#sample-id") == "tram-000001.v1"
        assert page.locator(".strip a").all_text_contents()[0].startswith("Video 1")
        assert page.get_attribute("dialog video", "preload") == "none"
        shown = page.text_content("dialog .record")
        for fact in ("10.0.0.5", "denoise-0.0", "ab" * 32, "Ulysses 8 x ring 1", "2.13.0", "c3" * 32):
            assert fact in shown
        seed = str(first_shard()[3]["seed"])
        assert len(seed) > 16, "JavaScript would round it"
        assert f"--seed {seed}" in page.text_content("dialog .command pre")


@pytest.mark.parametrize(
    "prompt", ["plain words", 'it\'s $HOME `id` \\ "x" !', "two\nlines\tand \x1b[2J \u202e é 你好 🦊"]
)
def test_the_command_of_a_sample_gives_its_prompt_to_the_shell_unchanged(browser, report_server, report_root, prompt):
    path = report_root / layout.commit_key(0, "lighthouse-000000.v0")
    record = json.loads(path.read_text())
    record["params"] |= {"prompt": prompt, "cfg_scale": 2.5, "negative_prompt": "-x 'y'"}
    path.write_text(json.dumps(record))
    with opened(browser, f"{report_server.url}#sample=lighthouse-000000.v0&shard=0") as page:
        page.wait_for_selector("dialog .facts")
        command = page.text_content("dialog .command pre")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", command)
    show = f"{sys.executable} -c 'import sys, json; print(json.dumps(sys.argv[1:]))'"
    result = subprocess.run(
        ["bash", "-c", command.replace("hv-batch", show, 1)], capture_output=True, timeout=30, check=True
    )
    arguments = json.loads(result.stdout)
    assert arguments[:3] == ["sample", "--prompt", prompt]
    assert arguments[-2:] == ["--neg-prompt", "-x 'y'"]


def test_the_page_of_a_run_that_goes_on_refreshes_without_losing_focus_scroll_or_search(
    browser, report_server, report_root
):
    path = report_root / "report/report.json"
    before = path.read_text()
    report = json.loads(before)
    try:
        with opened(browser, "about:blank", wait=None) as page:
            page.clock.install()
            page.goto(report_server.url)
            wait_until(page, READY)
            page.fill("#query", "harbour")
            page.clock.run_for(1000)
            wait_until(page, f"{SHOWN}.endsWith('of 10,000 samples')")
            page.evaluate("scrollTo(0, 900)")
            places = (
                "[...document.querySelectorAll('.card')].map((c) => [c.ariaPosInSet, c.getBoundingClientRect().top])"
            )
            seen = f"[{places}.slice(3, 9).map(([n, y]) => [n, Math.round(y / 4)]), document.activeElement.id, {SHOWN}]"
            before_refresh = page.evaluate(seen)
            report["generated_at"] += 60
            report["totals"] |= {"committed": 9_999, "pending": 1, "quarantined": 0}
            path.write_text(json.dumps(report))
            page.clock.run_for(61_000)
            wait_until(page, "document.querySelector('#tiles dd').textContent.startsWith('9,999')")
            assert page.evaluate(seen) == before_refresh
            assert "Updated: 9,999 of 10,000 samples committed" in page.text_content("#live")
    finally:
        path.write_text(before)


def test_documents_of_wrong_types_do_not_stop_the_page(browser, tmp_path):
    page = tmp_path / "index.html"
    page.write_text(render_page(misshapen_report(), [None, 7, {"key": [], "seed": {}, "facets": 3}]))
    with opened(browser, f"file://{page}", wait="document.querySelector('#name').textContent !== ''") as shown:
        for view in VIEWS:
            shown.click(f"#to-{view}")
            assert shown.is_visible(f"#view-{view}")


def test_a_refresh_shows_the_new_state_of_samples_that_were_embedded_in_the_page(browser, report_server, report_root):
    folder = report_root / "report"
    before = {path: path.read_text() for path in (folder / "report.json", folder / "parts/shard-00000.json")}
    report, part = map(json.loads, before.values())
    try:
        with opened(browser, "about:blank", wait="") as page:
            page.clock.install()
            page.goto(report_server.url)
            wait_until(page, READY)
            part["samples"][0] |= {"state": "quarantined", "class": "POISON", "message": "new", "file": None}
            report["generated_at"] += 60
            report["shards"][0]["quarantined"] += 1
            for path, document in zip(before, (report, part), strict=True):
                path.write_text(json.dumps(document))
            page.clock.run_for(61_000)
            page.clock.resume()
            wait_until(page, "document.querySelector('.card .outcome')?.textContent === 'Quarantined: POISONnew'")
    finally:
        for path, text in before.items():
            path.write_text(text)
