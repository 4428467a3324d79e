"""Frames to a file: mp4 for a video, streamed through ffmpeg; PNG for a single frame.

Equal frames and equal settings give equal bytes with one build of ffmpeg (P3): the thread count is pinned, and no date,
tool name or other metadata is written. Whatever goes wrong, neither a file nor a process is left behind.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import imageio_ffmpeg
import numpy as np

from hv_batch.job.config.sections import MediaConfig
from hv_batch.job.storage.local_disk import file_sha256
from hv_batch.media.codecs import jpeg_options, video_options
from hv_batch.media.png import encode_png

STDERR_LINES = 40  # the end of what ffmpeg says, kept for the error message; the rest is read and dropped
EXIT_TIMEOUT_S = 600.0  # from the last frame: draining the encoder and moving the index to the front of the file


@dataclass(frozen=True, slots=True)
class Poster:
    """The first frame of a video, as a JPEG."""

    path: Path
    sha256: str  # of the file


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """A finished media file."""

    path: Path
    suffix: str  # ".mp4" or ".png"
    bytes: int
    sha256: str  # of the file
    frames_sha256: str  # of the raw uint8 frames: equal pixels, whatever the encoder
    num_frames: int
    height: int
    width: int
    poster: Poster | None = None


def write_media(
    frames: Iterable[np.ndarray],
    stem: Path,
    *,
    height: int,
    width: int,
    num_frames: int,
    fps: int,
    media: MediaConfig,
) -> MediaInfo:
    """Encodes uint8 chunks [n, height, width, 3] into `stem` + ".mp4", or ".png" if `num_frames` is 1.

    Height and width must be even for a video (4:2:0 chroma). Only one chunk is held at a time. Raises ValueError if the
    chunks are not what was announced, OSError(ENOSPC) if the disk is full, RuntimeError with ffmpeg's words if it
    fails, and whatever `frames` raises.
    """
    suffix = ".png" if num_frames == 1 else ".mp4"
    path = stem.with_name(stem.name + suffix)
    poster_path = stem.with_name(stem.name + ".jpg") if media.poster and num_frames > 1 else None
    raw, shape = _raw_input(height, width, fps), (height, width, 3)
    try:
        if num_frames == 1:
            frames_sha256, frame = _feed(lambda _: None, frames, shape, num_frames)
            path.write_bytes(encode_png(frame))
        else:
            with _Encoder([*raw, *video_options(media), *_output(path)]) as encoder:
                frames_sha256, frame = _feed(encoder.write, frames, shape, num_frames)
        sha256, size = file_sha256(path), path.stat().st_size
        poster = Poster(poster_path, _write_poster(frame, poster_path, raw)) if poster_path else None
    except BaseException:
        for left in (path, poster_path):
            if left:
                left.unlink(missing_ok=True)
        raise
    return MediaInfo(
        path=path,
        suffix=suffix,
        bytes=size,
        sha256=sha256,
        frames_sha256=frames_sha256,
        num_frames=num_frames,
        height=height,
        width=width,
        poster=poster,
    )


def _write_poster(frame: np.ndarray, path: Path, raw: Sequence[str]) -> str:
    """The sha256 of the JPEG it writes."""
    with _Encoder([*raw, *jpeg_options(), *_output(path)]) as encoder:
        encoder.write(frame.data.cast("B"))
    return file_sha256(path)


def _raw_input(height: int, width: int, fps: int) -> list[str]:
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    return ["-hide_banner", "-nostdin", "-loglevel", "error", "-y", *raw]


def _output(path: Path) -> list[str]:
    return [f"file:{path}"]  # a path, whatever is in it


def _feed(
    write: Callable[[memoryview], None],
    frames: Iterable[np.ndarray],
    frame_shape: tuple[int, int, int],
    num_frames: int,
) -> tuple[str, np.ndarray]:
    """Writes every chunk; the sha256 of all of them, and the first frame. Raises ValueError unless as announced."""
    digest = hashlib.sha256()
    written = 0
    first: np.ndarray | None = None
    for chunk in frames:
        if chunk.dtype != np.uint8 or chunk.shape[1:] != frame_shape:
            raise ValueError(f"frames are {chunk.dtype} {chunk.shape[1:]}, announced were uint8 {frame_shape}")
        written += len(chunk)
        if written > num_frames:
            raise ValueError(f"at least {written} frames came, announced were {num_frames}")
        if len(chunk):
            if first is None:
                first = chunk[0].copy()
            raw = np.ascontiguousarray(chunk).data.cast("B")
            digest.update(raw)
            write(raw)
    if written != num_frames or first is None:
        raise ValueError(f"only {written} frames came, announced were {num_frames}")
    return digest.hexdigest(), first


class _Encoder:
    """One ffmpeg process that reads raw frames from its standard input.

    If this process is killed, ffmpeg sees the end of its input and ends too.
    """

    def __init__(self, arguments: list[str]) -> None:
        # A session of its own: Ctrl-C goes to the terminal's whole process group, and the encoder of a sample that is
        # still being drained must not die of it.
        self._process = subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        # Read all along: a full stderr pipe would stop ffmpeg, and then the write to its input.
        self._said: deque[bytes] = deque(maxlen=STDERR_LINES)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever happens, the process is gone after this; an error of its own is raised."""
        try:
            if error is None:
                self.finish()
        finally:
            self.kill()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            self._said.extend(stderr)

    def write(self, raw: memoryview) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(raw)
        except BrokenPipeError:
            self.finish()  # says why
            raise

    def finish(self) -> None:
        """Ends the input and waits; raises if ffmpeg failed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it ended before its input did: its exit status says why
            self._process.stdin.close()
        status = self._process.wait(EXIT_TIMEOUT_S)
        self._listener.join()
        said = b"".join(self._said).decode(errors="replace").strip()
        if os.strerror(errno.ENOSPC) in said:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {said}")
        if status < 0:  # the memory killer, usually
            raise ChildProcessError(errno.ECHILD, f"ffmpeg was killed by signal {-status}")
        if status != 0:
            raise RuntimeError(f"ffmpeg failed with status {status}: {said or 'it said nothing'}")

    def kill(self) -> None:
        """Ends the process if it still runs, and reaps it."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # closing flushes, and nobody reads any more
            self._process.stdin.close()
