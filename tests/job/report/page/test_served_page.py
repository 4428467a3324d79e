"""The page of a real output root, from the server of `hv-batch report --serve`, in Chromium."""

from __future__ import annotations

import shutil

from hv_batch.job.report.server.serve import serve_report
from hv_batch.job.storage.store import Store
from tests.support.browser import wait_until
from tests.support.repository import DATA


def test_the_page_shows_a_root_its_records_and_its_media_from_the_real_server(browser, tmp_path):
    shutil.copytree(DATA / "roots/revision-2", tmp_path / "root")
    faults, answers = [], []
    with serve_report(Store(str(tmp_path / "root"))) as server:
        context = browser.new_context()
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Policy" in message.text else None)
        page.on("response", lambda answer: answers.append((answer.status, answer.url)))
        page.goto(server.url)
        wait_until(page, "document.querySelectorAll('.card .id').length > 0")
        wait_until(page, "[...document.images].some((image) => image.naturalWidth > 0)")
        page.click(".card a >> nth=0")
        page.wait_for_selector("dialog .facts")
        assert "Frames sha256" in page.text_content("dialog .record")
        page.keyboard.press("Escape")
        for view in ("failures", "history", "run"):
            page.click(f"#to-{view}")
            assert page.is_visible(f"#view-{view}")
        assert faults == []
        assert [url for status, url in answers if status >= 400 and "favicon" not in url] == []
        context.close()
