"""hv_batch.job.log_records: both formats, the fields of each record, and no secret in a log."""

from __future__ import annotations

import io
import json
import logging

import pytest

from hv_batch.job.log_records import (
    LogSettings,
    SafeTextFilter,
    add_process_fields,
    configure_logging,
    log_fields,
)
from hv_batch.job.progress import ProgressLog, ProgressThrottle, Snapshot

SECRET = "planted-0123456789"
logger = logging.getLogger("hv_batch.tests")


@pytest.fixture
def stream(monkeypatch):
    """Where records go; the configuration of other tests is restored."""
    package = logging.getLogger("hv_batch")
    before, level = package.handlers, package.level
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    yield io.StringIO()
    configure_logging(LogSettings())
    package.handlers, package.level = before, level


def configure(stream, log_format="text", level="info", **fields):
    configure_logging(LogSettings(level, log_format), logging.StreamHandler(stream), **fields)


def test_a_record_says_which_run_worker_sample_and_attempt_it_is_about(stream):
    configure(stream, run="ab12", worker="decode-0.0")
    with log_fields(sample="fox-v0", attempt=2):
        logger.info("committed")
    logger.info("idle")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("INFO committed [run=ab12 worker=decode-0.0 sample=fox-v0 attempt=2]")
    assert second.endswith("INFO idle [run=ab12 worker=decode-0.0]")


def test_json_records_are_one_object_a_line_with_the_same_fields(stream):
    configure(stream, "json")
    add_process_fields(run="ab12")
    with log_fields(sample="fox-v0", attempt=1):
        logger.warning("two\nlines", extra={"worker": "denoise-0.0"})
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "warning",
        "logger": "hv_batch.tests",
        "message": "two\nlines",
        "run": "ab12",
        "worker": "denoise-0.0",
        "sample": "fox-v0",
        "attempt": 1,
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_secret_is_logged(stream, log_format):
    """P6: no credentials of URLs, signatures in queries or values of secret variables, also not in tracebacks."""
    configure(stream, log_format)
    logger.info("reading s3://user:%s@bucket/key?X-Amz-Signature=%s", SECRET, "abcdef")
    try:
        raise ValueError(f"denied for {SECRET} at https://host/file?sig=abcdef")
    except ValueError:
        logger.exception("failed with %s", SECRET)
    text = stream.getvalue()
    assert SECRET not in text
    assert "abcdef" not in text
    assert "ValueError" in text, "the rest of the traceback is there"


def test_a_short_value_of_a_variable_is_no_secret():
    """A password of one common word would make every log unreadable."""
    record = logging.makeLogRecord({"msg": "the key of the map"})
    SafeTextFilter({"API_KEY": "key"}).filter(record)
    assert record.getMessage() == "the key of the map"


@pytest.mark.parametrize(("level", "lines"), [("debug", 3), ("info", 2), ("error", 0)])
def test_the_level_is_the_packages(stream, level, lines):
    configure(stream, level=level)
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    assert len(stream.getvalue().splitlines()) == lines


def test_a_log_gets_few_lines_of_progress_and_a_json_log_their_numbers(stream):
    """A night's job log stays readable: one line in 30 s, whatever the rate of records."""
    handler = logging.StreamHandler(stream)
    handler.addFilter(ProgressThrottle(every_s=3600.0))
    configure_logging(LogSettings("info", "json"), handler)
    numbers = {"total": 9, "committed": 3, "quarantined": 1, "done_before": 0}
    snapshot = Snapshot(**numbers, starting=0, encoding=1, denoising=2, decoding=2)
    for _ in range(3):
        ProgressLog().log(snapshot)
    logger.info("between")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["message"].startswith(
        "44% · --/min · ETA --:-- · 4/9 done · 1 quarantined · running: 1 encode, 2 denoise"
    )
    assert numbers.items() <= first["progress"].items()
    assert second["message"] == "between"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_texts_from_outside_cannot_control_a_terminal_or_forge_a_record(stream, log_format):
    """A4: neither in the message, nor in a traceback, nor in a field."""
    configure(stream, log_format)
    attack = "\x1b[2J\x9b1A\r2026-11-28 12:00:00 INFO all is well"
    with log_fields(sample=f"fox{attack}"):
        try:
            raise ValueError(attack)
        except ValueError:
            logger.exception(f"prompt {attack}\n2026-11-28 12:00:00 INFO all is well")
    text = stream.getvalue()
    assert not [char for char in text if (char < " " and char != "\n") or "\x7f" <= char <= "\x9f"]
    assert sum(line.startswith("2026-11-28 12:00:00") for line in text.splitlines()) == 0
