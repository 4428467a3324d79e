"""The metrics of a run, scraped from a real Ray head."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request

import pytest

from hv_batch.job.storage.store import Store
from tests.support.runs import command, finish, start, write_config, write_manifest

DEADLINE_S = 60


def scrape(url, run):
    """The series of one run: (name, tags without those of Ray) -> value."""
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^(ray_hv_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        named = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if named.get("run") == run:
            found[name, named.get("state") or named.get("stage") or named.get("cause")] = float(value)
    return found


@pytest.mark.slow
def test_metrics_report_pending_samples_and_lost_groups(ray_head, metrics_url, tmp_path, marks):
    """While samples are held in their last step: pending samples by stage, lost groups; no label names a sample."""
    config = write_config(tmp_path, marks, {"hold_after": [4]})
    manifest, output = write_manifest(tmp_path, ["a !kill-denoise-once", "b", "c"]), tmp_path / "out"
    driver = start(command(config, manifest, output, ray_head[0]))
    try:
        wanted = {
            ("ray_hv_samples", "pending"): 3.0,
            ("ray_hv_samples", "committed"): 0.0,
            ("ray_hv_samples_in_work", "denoise"): 3.0,
            ("ray_hv_groups_lost_total", "INFRA"): 1.0,
        }
        deadline = time.monotonic() + DEADLINE_S
        seen = {}
        while not wanted.items() <= seen.items():
            assert time.monotonic() < deadline, "\n".join(map(str, seen.items()))
            time.sleep(0.2)
            try:
                seen = scrape(metrics_url, Store(str(output)).url)
            except urllib.error.URLError:  # the head's exporter starts a little after the head
                continue
        assert seen["ray_hv_denoise_seconds_lost_total", "INFRA"] > 0
        assert seen["ray_hv_task_seconds_count", "encode"] >= 1
    finally:
        (marks / "go-4").touch()
        code, text = finish(driver)
    assert code == 0, text
    assert not any(key in str(seen) for key in ("s00", "s01", "s02"))
