"""The report page in a real browser: what it shows and transfers, what it refuses, and how the keyboard moves in it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest

from hv_batch.bench.report_page.server import serve
from hv_batch.bench.report_page.synthetic import SyntheticReport, synthetic_samples
from hv_batch.bench.report_page.synthetic_root import write_root
from hv_batch.job import layout
from hv_batch.job.report.page import render_page
from tests.support.browser import wait_until
from tests.support.report_documents import hostile_report, misshapen_report

CLIP_BYTES = 20_000_000
READY = "document.querySelectorAll('.card .id').length > 0"
SHOWN = "document.querySelector('#shown').textContent"


@pytest.fixture(scope="module")
def large_root(tmp_path_factory):
    """10,000 videos of 20 MB, two for each prompt. Only the first shard has its media and records."""
    root = tmp_path_factory.mktemp("large")
    documents = SyntheticReport(list(synthetic_samples(10_000, videos=2)), running=True)
    first = SyntheticReport(documents_of_first_shard())
    write_root(root, first, clip_bytes=CLIP_BYTES)
    for name, part in {"report.json": documents.report, **documents.parts}.items():
        (root / "report" / name).write_text(json.dumps(part))
    (root / layout.REPORT).write_text(render_page(documents.report, documents.first))
    return root


def documents_of_first_shard():
    return list(synthetic_samples(250, videos=2))


@pytest.fixture(scope="module")
def server(large_root):
    with serve(large_root) as running:
        yield running


@contextmanager
def opened(browser, url, *, width=1280, height=800, scheme="light", wait=READY, **options):
    """The page in a window of its own. Errors of scripts and refusals of the content security policy fail the test."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console", lambda message: faults.append(message.text) if "Content Security Policy" in message.text else None
    )
    page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())
    try:
        page.goto(url)
        if wait:
            wait_until(page, wait)
        yield page
        assert not faults
    finally:
        context.close()


def settle(page):
    """Wait until the network is quiet, which covers the pauses that the page makes before it fetches."""
    page.wait_for_timeout(250)
    page.wait_for_load_state("networkidle")


def test_opening_10_000_videos_of_20_mb_transfers_less_than_5_mb_and_no_video(browser, server):
    server.sent.clear()
    with opened(browser, server.url) as page:
        settle(page)
        assert page.evaluate(SHOWN) == "10,000 samples"
        assert page.evaluate("[...document.images].filter((image) => image.naturalWidth > 0).length") >= 6
        assert page.locator("video").count() == 0
        assert sum(server.sent.values()) < 5_000_000
        assert server.sent["data"] == 0
        assert not any(name.startswith("report/parts") for name in server.requests), "the first samples are embedded"

        page.hover(".card >> nth=1")
        wait_until(page, "document.querySelector('video.preview')?.readyState >= 2")
        assert server.sent["data"] > 0
        page.hover("#query")
        assert page.locator("video").count() == 0


@pytest.mark.slow
def test_the_grid_has_as_many_elements_at_the_end_as_at_the_beginning(browser, server):
    with opened(browser, server.url) as page:
        settle(page)
        before = page.evaluate("document.querySelectorAll('*').length")
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        wait_until(page, "[...document.querySelectorAll('.card')].some((card) => card.ariaPosInSet === '10000')")
        wait_until(page, "document.querySelectorAll('.card a[href]').length > 3")
        assert page.evaluate("document.querySelectorAll('*').length") < 1.5 * before
        assert "report/parts/shard-00039.json" in server.requests
        assert "report/parts/shard-00020.json" not in server.requests, "a jump fetches only what is visible"


def test_search_facets_and_order_cover_all_samples_and_stand_in_the_url(browser, server):
    samples = list(synthetic_samples(10_000, videos=2))
    wanted = [s for s in samples if "harbour" in s["prompt"] and s["state"] == "quarantined"]
    with opened(browser, server.url) as page:
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


@pytest.mark.slow
def test_a_sample_has_its_whole_record_the_videos_of_its_prompt_and_a_command(browser, server):
    with opened(browser, f"{server.url}#sample=tram-000001.v1&shard=0") as page:
        page.wait_for_selector("dialog .facts")
        assert page.text_content("#sample-id") == "tram-000001.v1"
        assert page.locator(".strip a").all_text_contents()[0].startswith("Video 1")
        assert page.get_attribute("dialog video", "preload") == "none"
        shown = page.text_content("dialog .record")
        for fact in ("10.0.0.5", "denoise-0.0", "ab" * 32, "Ulysses 8 x ring 1", "2.13.0", "c3" * 32):
            assert fact in shown
        seed = str(documents_of_first_shard()[3]["seed"])
        assert len(seed) > 16, "JavaScript would round it"
        assert f"--seed {seed}" in page.text_content("dialog .command pre")


@pytest.mark.parametrize(
    "prompt", ["plain words", 'it\'s $HOME `id` \\ "x" !', "two\nlines\tand \x1b[2J \u202e é 你好 🦊"]
)
def test_the_command_of_a_sample_gives_its_prompt_to_the_shell_unchanged(browser, server, large_root, prompt):
    path = large_root / layout.commit_key(0, "lighthouse-000000.v0")
    record = json.loads(path.read_text())
    record["params"] |= {"prompt": prompt, "cfg_scale": 2.5, "negative_prompt": "-x 'y'"}
    path.write_text(json.dumps(record))
    with opened(browser, f"{server.url}#sample=lighthouse-000000.v0&shard=0") as page:
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


def test_a_page_from_a_disk_shows_the_first_samples_and_names_the_command_for_all(browser, large_root):
    with opened(browser, f"file://{large_root}/report/index.html") as page:
        settle(page)
        assert page.evaluate(SHOWN) == "60 samples"
        assert f"hv-batch report {large_root} --serve" in page.text_content("#notice")
        assert page.evaluate("[...document.images].filter((image) => image.naturalWidth > 0).length") >= 6
        page.click(".card a >> nth=1")
        assert f"hv-batch report {large_root} --serve" in page.text_content("dialog")
        assert "--seed" in page.text_content("dialog .command pre")
        page.evaluate("document.querySelector('dialog video').play()")
        wait_until(page, "document.querySelector('dialog video').readyState >= 2")


def test_the_grid_is_one_stop_of_the_tab_key_and_arrows_move_in_it(browser, server):
    active = "document.activeElement.closest('.card')?.ariaPosInSet ?? document.activeElement.id"
    with opened(browser, server.url) as page:
        settle(page)
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
        wait_until(page, f"location.hash.includes('{documents_of_first_shard()[int(below)]['key']}')")
        page.keyboard.press("Escape")
        wait_until(page, "!document.querySelector('dialog').open")
        assert page.evaluate(active) == str(int(below) + 1), "the focus is on the card of the last sample"
        page.keyboard.press("Tab")
        assert page.evaluate(active) in ("", "skip"), "the next stop is behind the grid"


@pytest.mark.slow
def test_the_page_of_a_run_that_goes_on_refreshes_without_losing_focus_scroll_or_search(browser, server, large_root):
    path = large_root / "report/report.json"
    before = path.read_text()
    report = json.loads(before)
    try:
        with opened(browser, "about:blank", wait=None) as page:
            page.clock.install()
            page.goto(server.url)
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


def test_hostile_documents_run_no_script_and_reach_no_other_host(browser, tmp_path):
    write_root(tmp_path, hostile_report(), media=False)
    requests = []
    with serve(tmp_path) as server, opened(browser, server.url) as page:
        page.on("request", lambda request: requests.append(request.url))
        for view in ("failures", "history", "run", "videos"):
            page.click(f"#to-{view}")
            page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
            assert "hacked=" in page.text_content(f"#view-{view}"), "the attacks are shown as text"
        for link in page.locator(".card a[href]").all()[:6]:
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


@pytest.mark.slow
def test_documents_of_wrong_types_do_not_stop_the_page(browser, tmp_path):
    page = tmp_path / "index.html"
    page.write_text(render_page(misshapen_report(), [None, 7, {"key": [], "seed": {}, "facets": 3}]))
    with opened(browser, f"file://{page}", wait="document.querySelector('#name').textContent !== ''") as shown:
        for view in ("failures", "history", "run", "videos"):
            shown.click(f"#to-{view}")
            assert shown.is_visible(f"#view-{view}")
