"""Rank 0's part of a group decode: an error of the media file must not leave the other ranks waiting (P5)."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from hv_batch.protocol import NonFiniteError
from hv_batch.runtime.groups.group_decode import RecordedDecode, record_decode
from tests.support.records import SAMPLE

CHUNKS = 4


class Group:
    """The frames that a denoiser yields on rank 0; `taken` are the chunks received from the other ranks."""

    def __init__(self, fault: Exception | None = None, at: int = 2):
        self.taken: list[int] = []
        self.fault, self.at = fault, at

    def _chunks(self):
        for number in range(CHUNKS):
            self.taken.append(number)
            if number == self.at and isinstance(self.fault, RuntimeError):
                raise self.fault  # a rank is gone
            yield number

    def decode(self):
        chunks = self._chunks()
        try:
            for number in chunks:
                if number == self.at and self.fault:
                    raise self.fault
                yield np.full((1, 8, 8, 3), number, np.uint8)
        finally:
            list(chunks)


class Writer:
    """A publisher that reads `reads` chunks and then raises its error, if any."""

    def __init__(self, fault: Exception | None = None, reads: int = CHUNKS):
        self.fault, self.reads = fault, reads

    def write(self, _sample, chunks, _folder):
        if self.reads == 0:
            raise self.fault
        for number, _ in enumerate(chunks, start=1):
            if self.fault and number == self.reads:
                raise self.fault
        return "media"


def test_a_file_is_made_of_all_chunks(tmp_path):
    """Without errors: the media and the duration."""
    group = Group()
    recording = record_decode(Writer(), SAMPLE, group.decode(), tmp_path)
    assert isinstance(recording, RecordedDecode)
    assert recording.media == "media"
    assert group.taken == [0, 1, 2, 3]


@pytest.mark.parametrize("reads", range(CHUNKS + 1))
def test_a_file_error_is_raised_after_all_ranks_have_ended(tmp_path, reads):
    """P5: the disk is full before the first chunk, after the last, or in between; every tile is received."""
    fault, group = OSError(errno.ENOSPC, "no space"), Group()
    assert record_decode(Writer(fault, reads), SAMPLE, group.decode(), tmp_path) is fault
    assert group.taken == [0, 1, 2, 3]


def test_frames_that_are_not_finite_are_reported_after_all_ranks_have_ended(tmp_path):
    """P5: only rank 0 has the error; the group stays usable."""
    fault = NonFiniteError("not finite")
    group = Group(fault)
    assert record_decode(Writer(), SAMPLE, group.decode(), tmp_path) is fault
    assert group.taken == [0, 1, 2, 3]


@pytest.mark.parametrize("writer", [Writer(), Writer(OSError(errno.ENOSPC, "no space"), 1)], ids=["well", "disk full"])
def test_a_rank_that_is_gone_ends_the_group(tmp_path, writer):
    """P5: the error is raised at once, because the other ranks may be waiting in a collective."""
    group = Group(RuntimeError("connection closed by peer"))
    with pytest.raises(RuntimeError, match="closed by peer"):
        record_decode(writer, SAMPLE, group.decode(), tmp_path)
