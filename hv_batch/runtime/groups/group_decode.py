"""Rank 0's part of a group decode: it writes the media file while all ranks decode, and defers its own errors.

If one rank stops in the middle of a decode, the other ranks wait for it and the whole group must be rebuilt. A full
disk, a dead ffmpeg and non-finite pixels are errors of rank 0 alone. After such an error rank 0 still receives the
remaining tiles, all ranks finish, and the error is raised in the next call, `publish`.
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
    seconds: float  # duration of the decode


def record_decode(publisher: Publisher, sample: Sample, chunks: Chunks, folder: Path) -> RecordedDecode | Exception:
    """The media file, or the error that prevented it. Raises only errors of the collective decode itself."""
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
    """The frames of a group decode. `is_broken` is set if the decode itself failed, so that ranks may be waiting."""

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
        """Receive the remaining tiles, so that the other ranks can finish."""
        with suppress(NonFiniteError):
            next(self._chunks, None)  # a generator that is closed before its first item would receive nothing
            self._chunks.close()
