"""The metrics of a run, scraped from a real Ray head."""

from __future__ import annotations

import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from hv_batch.job.storage.store import Store
from tests.support.otlp_receiver import attributes_of, otlp_receiver
from tests.support.runs import command, finish, start, write_config, write_manifest

DEADLINE_S = 150  # the group that replaces the lost one needs another encoder
TAGS = ("state", "stage", "cause", "use", "look")


def scrape(url, run):
    """The series of one run: (name, tags without those of Ray) -> value."""
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^(ray_hv_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        named = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if named.get("run") == run:
            found[name, next((named[tag] for tag in TAGS if tag in named), None)] = float(value)
    return found


def watch(url, run, ended):
    """Scrape until `ended` is set; the last value of each series."""
    seen = {}
    while not ended.wait(0.1):
        seen |= scrape(url, run)
    return seen


@pytest.mark.slow
def test_metrics_report_pending_samples_and_lost_groups(ray_head, metrics_url, tmp_path, marks, monkeypatch):
    """While samples are held in their last step: pending samples by stage, lost groups; no label names a sample.

    At the end, also with an OpenTelemetry receiver: the time of the end is still scraped, and each stage has a span.
    """
    config = write_config(tmp_path, marks, {"hold_after": [4]}, timeouts={"stall_s": 170})
    manifest, output = write_manifest(tmp_path, ["a !kill-denoise-once", "b", "c"]), tmp_path / "out"
    with otlp_receiver() as receiver, ThreadPoolExecutor(1) as thread:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        driver, ended = start(command(config, manifest, output, ray_head[0])), threading.Event()
        try:
            wanted = {
                ("ray_hv_samples", "pending"): 3.0,
                ("ray_hv_samples", "committed"): 0.0,
                ("ray_hv_samples_in_work", "denoise"): 3.0,
                ("ray_hv_groups_lost_total", "INFRA"): 1.0,
                ("ray_hv_groups_lost_total", "GPU_OOM"): 0.0,  # so that `increase()` sees the first one
                ("ray_hv_videos_total", "black"): 0.0,
                ("ray_hv_output_root_away_seconds", None): 0.0,
                ("ray_hv_spool_unusable", None): 0.0,
                ("ray_hv_driver_ended_timestamp_seconds", None): 0.0,
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
            assert seen["ray_hv_gpu_seconds_lost_total", "INFRA"] > 0
            assert seen["ray_hv_task_seconds_count", "encode"] >= 1
            assert abs(time.time() - seen["ray_hv_driver_heartbeat_timestamp_seconds", None]) < 30
            started, progressed = (
                seen[f"ray_hv_{what}_timestamp_seconds", None] for what in ("driver_started", "progress")
            )
            assert started < progressed <= time.time()
            watched = thread.submit(watch, metrics_url, Store(str(output)).url, ended)
        finally:
            (marks / "go-4").touch()
            code, text = finish(driver)
            time.sleep(1)
            ended.set()
    assert code == 0, text
    assert re.search(rf"metrics for Prometheus: http://[^ ]+:{urlsplit(metrics_url).port}/metrics ", text), text
    assert not any(key in str(seen) for key in ("s00", "s01", "s02"))
    last = watched.result()
    assert last["ray_hv_driver_ended_timestamp_seconds", None] > progressed
    assert last["ray_hv_samples", "pending"] == 0
    assert last["ray_hv_gpu_seconds_total", "denoise"] > last["ray_hv_gpu_seconds_total", "encode"] == 0
    assert sum(last["ray_hv_videos_total", look] for look in ("ok", "black", "white", "flat", "still")) == 3
    done = Counter(
        (span.name, attributes_of(span)["hv.sample"].string_value) for span in receiver.spans if not span.status.code
    )
    assert done.keys() >= {(stage, key) for stage in ("encode", "denoise", "decode") for key in ("s00", "s01", "s02")}
    assert any(attributes_of(span)["hv.failure"].string_value == "INFRA" for span in receiver.spans if span.status.code)
