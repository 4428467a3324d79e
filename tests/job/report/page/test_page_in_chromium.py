"""The report page in a real browser: what it shows and transfers, what it refuses, and how the keyboard moves in it."""

from __future__ import annotations

import re
import shutil

import pytest

from hv_batch.bench.report_page.server import serve
from hv_batch.bench.report_page.synthetic import synthetic_samples
from hv_batch.bench.report_page.synthetic_root import write_root
from hv_batch.job.report.server.serve import serve_report
from hv_batch.job.storage.store import Store
from tests.support.browser import wait_until
from tests.support.report_documents import hostile_report
from tests.support.report_pages import POSTERS, SHOWN, VIEWS, check_access, first_shard, opened
from tests.support.repository import DATA


def test_opening_10_000_videos_of_20_mb_transfers_less_than_5_mb_and_no_video(browser, report_server):
    report_server.sent.clear()
    with opened(browser, report_server.url) as page:
        wait_until(page, f"{POSTERS} >= 6")
        page.wait_for_timeout(200)  # longer than the page waits before it fetches the parts in view
        assert page.evaluate(SHOWN) == "10,000 samples"
        assert page.locator("video").count() == 0
        assert sum(report_server.sent.values()) < 5_000_000
        assert report_server.sent["data"] == 0
        assert not any(name.startswith("report/parts") for name in report_server.requests), (
            "the first samples are embedded"
        )

        page.hover(".card >> nth=1")
        wait_until(page, "document.querySelector('video.preview')?.readyState >= 2")
        assert report_server.sent["data"] > 0
        page.hover("#query")
        assert page.locator("video").count() == 0


def test_search_facets_and_order_cover_all_samples_and_stand_in_the_url(browser, report_server):
    samples = list(synthetic_samples(10_000, videos=2))
    wanted = [s for s in samples if "harbour" in s["prompt"] and s["state"] == "quarantined"]
    with opened(browser, report_server.url) as page:
        page.fill("#query", "harbour")
        page.check("label.value:has-text('Quarantined') input")
        wait_until(page, f"{SHOWN} === '{len(wanted)} of 10,000 samples'")
        page.select_option("#sort", "id")
        wait_until(page, f"document.querySelector('.card .id span').textContent === '{min(s['id'] for s in wanted)}'")
        url = page.url
    with opened(browser, url) as page:
        wait_until(page, f"{SHOWN} === '{len(wanted)} of 10,000 samples'")
        assert page.input_value("#query") == "harbour"
        assert page.locator(".card .id span").first.text_content() == min(s["id"] for s in wanted)


def test_a_page_from_a_disk_shows_the_first_samples_and_names_the_command_for_all(browser, report_root):
    with opened(browser, f"file://{report_root}/report/index.html") as page:
        wait_until(page, f"{POSTERS} >= 6")
        assert page.evaluate(SHOWN) == "60 samples"
        assert f"hv-batch report {report_root} --serve" in page.text_content("#notice")
        page.click(".card a >> nth=1")
        assert f"hv-batch report {report_root} --serve" in page.text_content("dialog")
        assert "--seed" in page.text_content("dialog .command pre")
        page.evaluate("document.querySelector('dialog video').play()")
        wait_until(page, "document.querySelector('dialog video').readyState >= 2")


def test_the_grid_is_one_stop_of_the_tab_key_and_arrows_move_in_it(browser, report_server):
    active = "document.activeElement.closest('.card')?.ariaPosInSet ?? document.activeElement.id"
    with opened(browser, report_server.url) as page:
        page.keyboard.press("Tab")
        assert page.evaluate(active) == "skip"
        stops = 1
        while page.evaluate(active) != "1":
            page.keyboard.press("Tab")
            stops += 1
            assert stops < 40, "the way to the videos is short"
        page.keyboard.press("ArrowRight")
        assert page.evaluate(active) == "2"
        page.keyboard.press("End")
        assert page.evaluate(active) == "10000"
        page.keyboard.press("Home")
        page.keyboard.press("ArrowDown")
        below = page.evaluate(active)
        assert int(below) > 2
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog[open]")
        assert page.evaluate("document.activeElement.id") == "sample-id"
        page.keyboard.press("ArrowRight")
        wait_until(page, f"location.hash.includes('{first_shard()[int(below)]['key']}')")
        page.keyboard.press("Escape")
        wait_until(page, "!document.querySelector('dialog').open")
        assert page.evaluate(active) == str(int(below) + 1), "the focus is on the card of the last sample"
        page.keyboard.press("Tab")
        assert page.evaluate(active) in ("", "skip"), "the next stop is behind the grid"


def test_hostile_documents_run_no_script_and_reach_no_other_host(browser, tmp_path):
    write_root(tmp_path, hostile_report(), media=False)
    requests = []
    with serve(tmp_path) as server, opened(browser, server.url) as page:
        page.on("request", lambda request: requests.append(request.url))
        for view in VIEWS:
            page.click(f"#to-{view}")
            page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
            assert "hacked=" in page.text_content(f"#view-{view}"), "the attacks are shown as text"
        for link in page.locator(".card a[href]").all()[:2]:
            link.click()
            page.wait_for_selector("dialog[open] .record > *")
            page.keyboard.press("Escape")
        page.fill("#query", "<script>window.hacked")
        wait_until(page, f"{SHOWN}.includes(' of ')")
        links = page.evaluate("[...document.querySelectorAll('[href], [src], [poster]')].map((e) => e.href ?? e.src)")
        assert all(link.startswith(server.url) for link in links)
        assert page.evaluate("window.hacked") is None
        root = re.escape(server.url.removesuffix("index.html"))
        part, record = rf"{root}parts/shard-\d{{5}}\.json", r".*/(commits|quarantine)/shard-0000\d/h\d+\.json"
        assert {url for url in requests if not re.fullmatch(f"{part}|{record}", url)} <= {server.url}


def test_the_page_shows_a_root_its_records_and_its_media_from_the_real_server(browser, tmp_path):
    shutil.copytree(DATA / "roots/revision-2", tmp_path / "root")
    answers = []
    with serve_report(Store(str(tmp_path / "root"))) as server, opened(browser, server.url) as page:
        page.on("response", lambda answer: answers.append((answer.status, answer.url)))
        wait_until(page, f"{POSTERS} > 0")
        page.click(".card a >> nth=0")
        page.wait_for_selector("dialog .facts")
        assert "Frames sha256" in page.text_content("dialog .record")
        page.keyboard.press("Escape")
        for view in VIEWS:
            page.click(f"#to-{view}")
            assert page.is_visible(f"#view-{view}")
        assert [url for status, url in answers if status >= 400 and "favicon" not in url] == []


@pytest.mark.parametrize("scheme", ["dark", pytest.param("light", marks=pytest.mark.slow)])
def test_every_text_has_the_contrast_of_level_aa_and_headings_are_in_order(browser, report_server, scheme):
    with opened(browser, report_server.url, color_scheme=scheme) as page:
        check_access(page)
