"""hv_batch.cli.process: messages that nobody reads neither fail nor block."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest

from hv_batch.cli import process
from hv_batch.cli.process import lossy_stream


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr(process, "WAIT_S", 0.05)
    monkeypatch.setattr(process._LossyFile, "_wait_s", 0.05)
    reader, writer = os.pipe()
    yield reader, writer
    for number in (reader, writer):
        with suppress(OSError):
            os.close(number)


def test_messages_arrive_whole(pipe):
    reader, writer = pipe
    print("a" * 9000, file=lossy_stream(writer))
    assert os.read(reader, 10_000) == b"a" * 9000 + b"\n"


def test_messages_to_a_reader_that_is_gone_are_lost(pipe):
    reader, writer = pipe
    os.close(reader)
    print("nobody reads this", file=lossy_stream(writer))


def test_messages_to_a_reader_that_stands_still_are_dropped_and_counted(pipe):
    """The writer waits for a full pipe once, and says afterwards how much was lost."""
    reader, writer = pipe
    stream = lossy_stream(writer)
    for _ in range(40):
        print("x" * 4095, file=stream)
    os.set_blocking(reader, False)
    taken = os.read(reader, 1 << 20)
    assert len(taken) == 65536
    print("again", file=stream)
    assert (
        os.read(reader, 1000).decode()
        == f"[{40 * 4096 - 65536} bytes of messages were dropped: nobody read them]\nagain\n"
    )
