"""Traces by the real SDK, over real HTTP."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.runtime.driver import stage_spans
from hv_batch.runtime.driver.stage_spans import start_spans
from hv_batch.runtime.worker import InFlight
from tests.support.otlp_receiver import attributes_of, otlp_receiver
from tests.support.records import SAMPLE

WORKER = WorkerId(Stage.DENOISE, 0, 1)


@pytest.fixture
def receiver(monkeypatch):
    with otlp_receiver() as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret-of-the-receiver")
        yield server


def in_flight(key, prompt="a fox"):
    return InFlight(replace(SAMPLE, key=key, params=replace(SAMPLE.params, prompt=prompt)))


def test_a_sample_is_one_trace_with_a_span_per_stage_and_attempt(receiver):
    """Spans hold names, times and the failure class; no prompt, no message, no secret."""
    prompt = "a prompt that nobody may see"
    sample = in_flight("s00", prompt)
    other = in_flight("s01", prompt)
    spans = start_spans("s3://bucket/run")
    begun = time.monotonic() - 5.0
    spans.task_ended(WorkerId(Stage.ENCODE, 0, 0), ["n1"], Stage.ENCODE, [sample, other], begun)
    spans.task_ended(WORKER, ["n2", "n1"], Stage.DENOISE, [sample], begun, FailureClass.INFRA)
    sample.failures = (Failure(FailureClass.INFRA, f"lost with {prompt}"),)
    spans.task_ended(WORKER, ["n1"], Stage.DENOISE, [sample], begun)
    spans.close()
    own = [span for span in receiver.spans if attributes_of(span)["hv.sample"].string_value == "s00"]
    assert [span.name for span in own] == ["encode", "denoise", "denoise"]
    assert len({span.trace_id for span in receiver.spans}) == 2, "one trace for each sample"
    assert [span.parent_span_id for span in own] == [b"", own[0].span_id, own[0].span_id]
    assert [attributes_of(span)["hv.attempt"].int_value for span in own] == [1, 1, 2]
    assert [span.status.code for span in own] == [0, 2, 0]
    assert attributes_of(own[1])["hv.failure"].string_value == "INFRA"
    assert attributes_of(own[1])["hv.worker"].string_value == "denoise-0.1"
    assert 5.0 <= (own[0].end_time_unix_nano - own[0].start_time_unix_nano) / 1e9 < 10.0
    assert receiver.resources[0]["service.name"] == "hv_batch"
    assert receiver.resources[0]["hv.run"] == "s3://bucket/run"
    assert receiver.headers[0]["authorization"] == "secret-of-the-receiver"
    assert not [body for body in receiver.bodies if prompt.encode() in body or b"secret" in body]


def test_a_receiver_that_hangs_delays_neither_the_loop_nor_the_end(receiver, monkeypatch):
    monkeypatch.setattr(stage_spans, "CLOSE_S", 0.2)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    receiver.hold.clear()
    spans, item = start_spans("run"), in_flight("s00")
    for _ in range(100):  # more than the queue of the SDK holds
        spans.task_ended(WORKER, ["n1"], Stage.DENOISE, [item], time.monotonic())
    assert not receiver.bodies, "the receiver has answered nothing, so nothing waited for it"
    spans.close()
    assert not receiver.bodies


def test_there_are_no_spans_without_an_endpoint(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert start_spans("run") is None


def test_variables_that_are_not_valid_do_not_end_the_run_and_their_values_are_not_logged(receiver, monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "secret")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    assert start_spans("run") is None
    assert "OTEL_BSP_" in caplog.text
    assert "secret" not in caplog.text


def test_a_missing_package_is_named_with_its_extra(receiver, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert start_spans("run") is None
    assert "hv_batch[otel]" in caplog.text
