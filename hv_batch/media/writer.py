"""Write frames to a media file: an mp4 for a video, streamed through ffmpeg, or a PNG for a single frame.

Equal frames and equal settings give equal bytes with one build of ffmpeg on one CPU architecture (P3): the number of
threads, the instruction set and the content of fresh memory are fixed (see `ffmpeg`), and no date, tool name or other
metadata is written. After any failure, neither a file nor a process remains.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from hv_batch.job.config.sections import MediaConfig
from hv_batch.job.storage.local_disk import file_sha256
from hv_batch.media.codecs import video_options
from hv_batch.media.ffmpeg import FfmpegError, find_ffmpeg, kill_ffmpeg, start_ffmpeg
from hv_batch.media.frame_scores import FrameScorer
from hv_batch.media.poster import PosterFrame, encode_poster

STDERR_LINES = 40  # last lines of ffmpeg's stderr that are kept for the error message
PNG_LEVEL = 3  # of zlib; the default, 6, takes several times as long and saves 3 % of the bytes
EXIT_TIMEOUT_S = 600.0  # after the last frame: flushing the encoder and moving the index to the front of the file


@dataclass(frozen=True, slots=True)
class Poster:
    """A frame of a video, as a JPEG (`hv_batch.media.poster`)."""

    path: Path
    sha256: str  # of the file


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """A finished media file."""

    path: Path
    suffix: str  # ".mp4" or ".png"
    bytes: int
    sha256: str  # of the file
    frames_sha256: str  # of the raw uint8 frames, independent of the encoder
    num_frames: int
    height: int
    width: int
    scores: Mapping[str, float] = field(default_factory=dict)  # of the raw frames: `hv_batch.job.quality.SCORES`
    poster: Poster | None = None
    hook: Mapping[str, Any] | None = None  # what the sample hook has answered


def write_media(
    frames: Iterable[np.ndarray],
    stem: Path,
    *,
    height: int,
    width: int,
    num_frames: int,
    fps: int,
    media: MediaConfig,
    exit_timeout_s: float = EXIT_TIMEOUT_S,
) -> MediaInfo:
    """Encode uint8 chunks [n, height, width, 3] into `stem` + ".mp4", or ".png" if `num_frames` is 1.

    Height and width must be even for a video (4:2:0 chroma). Only one chunk is in memory at a time. Raises ValueError
    if the chunks do not match `height`, `width` and `num_frames`, OSError(ENOSPC) if the disk is full, FfmpegError with
    ffmpeg's message if ffmpeg cannot be started, fails, is killed by a signal, or does not end within `exit_timeout_s`
    seconds of its last frame, and any exception of `frames`.
    """
    suffix = ".png" if num_frames == 1 else ".mp4"
    path = stem.with_name(stem.name + suffix)
    poster_path = stem.with_name(stem.name + ".jpg") if media.poster and num_frames > 1 else None
    raw, shape = _raw_input(height, width, fps), (height, width, 3)
    scorer = FrameScorer()
    try:
        if num_frames == 1:
            frames_sha256, frame = _feed(lambda _: None, scorer, frames, shape, num_frames)
            path.write_bytes(encode_png(frame))
        else:
            with _Encoder([*raw, *video_options(media), *_output(path)], exit_timeout_s) as encoder:
                frames_sha256, frame = _feed(encoder.write, scorer, frames, shape, num_frames)
        sha256, size = file_sha256(path), path.stat().st_size
        poster = _write_poster(frame, poster_path) if poster_path else None
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
        scores=scorer.scores(),
        poster=poster,
    )


def encode_png(frame: np.ndarray) -> bytes:
    """Return the bytes of a PNG file with exactly the pixels of a uint8 frame [height, width, 3].

    They depend on the version of Pillow, which every commit record names. Pillow does not write into the file itself,
    because its errors do not say that a disk is full.
    """
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


def _write_poster(frame: np.ndarray, path: Path) -> Poster:
    data = encode_poster(frame)
    path.write_bytes(data)  # as in `encode_png`, Pillow does not write into the file
    return Poster(path, hashlib.sha256(data).hexdigest())


def _raw_input(height: int, width: int, fps: int) -> list[str]:
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    return ["-hide_banner", "-nostdin", "-loglevel", "error", "-y", *raw]


def _output(path: Path) -> list[str]:
    return [f"file:{path}"]  # the prefix keeps ffmpeg from interpreting the path as a URL or an option


def _feed(
    write: Callable[[memoryview], None],
    scorer: FrameScorer,
    frames: Iterable[np.ndarray],
    frame_shape: tuple[int, int, int],
    num_frames: int,
) -> tuple[str, np.ndarray]:
    """Pass every chunk to `write` and `scorer`. Returns the sha256 of all frames, and that of the poster.

    Raises ValueError if dtype, size or number of the frames differ from `frame_shape` and `num_frames`.
    """
    digest = hashlib.sha256()
    written = 0
    chosen = PosterFrame()
    for chunk in frames:
        if chunk.dtype != np.uint8 or chunk.shape[1:] != frame_shape:
            raise ValueError(f"frames are {chunk.dtype} {chunk.shape[1:]}, expected uint8 {frame_shape}")
        written += len(chunk)
        if written > num_frames:
            raise ValueError(f"received at least {written} frames, expected {num_frames}")
        if len(chunk):
            chosen.look(chunk)
            raw = np.ascontiguousarray(chunk).data.cast("B")
            digest.update(raw)
            write(raw)
            scorer.add(chunk)  # after the write, so that ffmpeg encodes meanwhile
    if written != num_frames or chosen.frame is None:
        raise ValueError(f"received only {written} frames, expected {num_frames}")
    return digest.hexdigest(), chosen.frame


class _Encoder:
    """An ffmpeg process that reads raw frames from its standard input.

    If this process is killed, ffmpeg reaches the end of its input and exits.
    """

    def __init__(self, arguments: list[str], exit_timeout_s: float) -> None:
        self._exit_timeout_s = exit_timeout_s
        self._process = start_ffmpeg(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._ffmpeg = find_ffmpeg()  # its path, for messages
        # A thread reads stderr: a full pipe would block ffmpeg, and thereby the write to its input.
        self._stderr: deque[bytes] = deque(maxlen=STDERR_LINES)
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for ffmpeg, or kill it if the block has failed. Raises the error of ffmpeg, if any."""
        try:
            if error is None:
                self.finish()
        finally:
            self.kill()

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            self._stderr.extend(stderr)

    def write(self, raw: memoryview) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(raw)
        except BrokenPipeError:
            self.finish()  # raises ffmpeg's error
            raise

    def finish(self) -> None:
        """Close the input and wait for ffmpeg. Raises OSError(ENOSPC) or FfmpegError if it failed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # ffmpeg exited early; its exit status is checked below
            self._process.stdin.close()
        try:
            status = self._process.wait(self._exit_timeout_s)
        except subprocess.TimeoutExpired:
            waited = f"{self._exit_timeout_s:g} s"
            raise FfmpegError(f"ffmpeg did not end within {waited} of its last frame: {self._ffmpeg}") from None
        self._reader.join()
        stderr = b"".join(self._stderr).decode(errors="replace").strip()
        if os.strerror(errno.ENOSPC) in stderr:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {stderr}")
        if status < 0:  # usually the kernel's out-of-memory killer
            raise FfmpegError(f"ffmpeg was killed by signal {-status}: {self._ffmpeg}")
        if status != 0:
            reason = stderr or "no message on stderr"
            raise FfmpegError(f"ffmpeg failed with status {status}: {self._ffmpeg}: {reason}")

    def kill(self) -> None:
        """Kill the process if it is running, and reap it."""
        kill_ffmpeg(self._process)
        self._reader.join()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # closing flushes the buffer, but ffmpeg no longer reads
            self._process.stdin.close()
