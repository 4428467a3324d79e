"""Splits a text file into blocks of complete lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from hv_batch.job.manifest.formats import limits

BOM = b"\xef\xbb\xbf"  # the byte order mark that some editors write at the start of a file


def line_blocks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Blocks of complete lines, with the number of the first one. A line that is too long is truncated."""
    number, rest, skipping = 1, b"", False
    while data := file.read(limits.CHUNK_BYTES):
        if skipping:
            _, newline, data = data.partition(b"\n")
            skipping = not newline
        end = data.rfind(b"\n")
        if end >= 0:
            block, rest = rest + data[:end], data[end + 1 :]
            yield number, block
            number += block.count(b"\n") + 1
        elif not skipping:
            rest += data
        if len(rest) > limits.MAX_LINE_BYTES:
            yield number, rest[: limits.MAX_LINE_BYTES + 1]
            number, rest, skipping = number + 1, b"", True
    if rest:
        yield number, rest


def numbered_lines(first: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a block without surrounding white space; blank lines are counted and skipped."""
    for number, line in enumerate(data.split(b"\n"), start=first):
        if number == 1:
            line = line.removeprefix(BOM)
        line = line.strip()
        if line:
            yield number, line
