"""Rank 0's side of a decode in a group: the file is made while all ranks decode, and what is wrong with it told later.

In the middle of a decode an error of one rank leaves the others waiting for it, and the whole group has to go. A full
disk, an encoder that dies and pixels that are not finite are no reason for that: rank 0 takes what the others still
send, all ranks end as ever, and the error is raised when rank 0 is asked to commit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hv_batch.job.manifest.samples import Sample
from hv_batch.media.writer import MediaInfo
from hv_batch.protocol import NonFiniteError
from hv_batch.runtime.publisher import Publisher
from hv_batch.runtime.run_context import stopwatch

Chunks = Generator[np.ndarray, None, None]


@dataclass(frozen=True, slots=True)
class RecordedDecode:
    media: MediaInfo
    seconds: float  # that decoding took


def record_decode(publisher: Publisher, sample: Sample, chunks: Chunks, folder: Path) -> RecordedDecode | Exception:
    """The media file, or why there is none; raises only what leaves ranks waiting for each other."""
    stream = _Stream(chunks)
    try:
        with stopwatch() as watch:
            media = publisher.write(sample, stream.frames(), folder)
        return RecordedDecode(media, watch.seconds)
    except Exception as error:
        if stream.is_broken:
            raise
        stream.finish()
        return error


class _Stream:
    """The chunks of a `Denoiser`, and whether it was the ranks that ended them."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self.is_broken = False

    def frames(self) -> Iterator[np.ndarray]:
        try:
            yield from self._chunks
        except (GeneratorExit, NonFiniteError):
            raise
        except Exception:
            self.is_broken = True
            raise

    def finish(self) -> None:
        """Nobody wants the rest, but the other ranks are to end."""
        with suppress(NonFiniteError):
            next(self._chunks, None)  # closed before it had begun, it would not know that it was to take anything
            self._chunks.close()
