"""`hv-batch report`: where it writes, what it prints and opens, and the server as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.storage.store import Store
from tests.support.cli_calls import json_of, run_main
from tests.support.repository import ROOT
from tests.support.small_runs import run_small, some_samples


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rendered") / "root"
    run_small(Store(str(root)), some_samples(3), poison={"s001"})
    return root


def test_it_writes_the_report_and_says_where(root):
    """The command works for a root whose report is gone, and prints the counts and the location."""
    (root / layout.REPORT).unlink()
    code, stdout, stderr = run_main("report", root, "--price-gpu-hour", "2")
    assert code == 0
    assert stdout.splitlines() == [
        "3 samples: 2 committed, 1 quarantined, 0 pending",
        f"report: {root}/report/index.html",
    ]
    assert f"hv-batch report {root} --serve" in stderr
    assert (root / layout.REPORT).exists()
    assert json.loads((root / layout.REPORT_DATA).read_bytes())["totals"]["price_per_gpu_hour"] == 2.0


@pytest.mark.slow
def test_it_opens_the_browser(root, tmp_path):
    """--open opens the page of a folder with the browser of the environment."""
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    command = [sys.executable, "-m", "hv_batch", "report", str(root), "--open"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "BROWSER": f"{browser} %s"}, check=True, timeout=120)
    assert opened.read_text().strip() == (root / layout.REPORT).as_uri()


def test_a_root_of_an_object_store_is_opened_with_a_server():
    """P6: a browser cannot open such a URL; the message names the flag."""
    store = Store("memory://report-of-a-store")
    run_small(store, some_samples(1))
    code, answer = json_of("report", store.url)
    assert (code, answer["report"]) == (0, "memory://report-of-a-store/report/index.html")
    code, _, stderr = run_main("report", store.url, "--open")
    assert code == 1
    assert "Add --serve" in stderr


def test_a_root_without_a_run_is_named(tmp_path):
    code, _, stderr = run_main("report", tmp_path)
    assert code == 1
    assert str(tmp_path) in stderr


def test_the_server_is_a_process_that_a_signal_ends(root):
    """It prints its URL, answers, and leaves neither a port nor a temporary folder."""
    command = [sys.executable, "-m", "hv_batch", "report", str(root), "--serve", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        lines = []
        try:
            while not lines or lines[-1] != "}\n":
                lines.append(child.stdout.readline())
            url = json.loads("".join(lines))["report"]
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert b'id="report"' in answer.read()
        finally:
            child.send_signal(signal.SIGINT)
            child.wait(30)
    assert child.returncode == 143
