"""Frames to a file: H.264 in mp4 for a video, PNG for a single frame, streamed through ffmpeg.

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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np

STDERR_LINES = 40  # the end of what ffmpeg says, kept for the error message; the rest is read and dropped
EXIT_TIMEOUT_S = 600.0  # from the last frame: draining the encoder and moving the index to the front of the file

# RGB of the full range to BT.709 of the limited range, with the precise kernels: by default ffmpeg would use the BT.601
# matrix for rgb24 input and leave the file untagged, and players would guess. Chroma is averaged over 2x2 pixels.
_TO_YUV420 = (
    "scale=in_range=full:out_range=limited:out_color_matrix=bt709:flags=bicubic+accurate_rnd+full_chroma_int+bitexact,"
    "format=yuv420p,"
    "setparams=range=limited:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
_BITEXACT = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact")


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


def write_media(
    frames: Iterable[np.ndarray],
    stem: Path,
    *,
    height: int,
    width: int,
    num_frames: int,
    fps: int,
    crf: int,
    preset: str,
    threads: int,
) -> MediaInfo:
    """Encodes uint8 chunks [n, height, width, 3] into `stem` + ".mp4", or ".png" if `num_frames` is 1.

    Height and width must be even for a video (4:2:0 chroma). Only one chunk is held at a time. Raises ValueError if the
    chunks are not what was announced, OSError(ENOSPC) if the disk is full, RuntimeError with ffmpeg's words if it
    fails, and whatever `frames` raises.
    """
    suffix = ".png" if num_frames == 1 else ".mp4"
    path = stem.with_name(stem.name + suffix)
    output = _png_options() if num_frames == 1 else _h264_options(crf, preset, threads)
    encoder = _Encoder([*_raw_input(height, width, fps), *output, f"file:{path}"])  # a path, whatever is in it
    try:
        frames_sha256 = _feed(encoder, frames, (height, width, 3), num_frames)
        encoder.finish()
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    except BaseException:
        encoder.kill()
        path.unlink(missing_ok=True)
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
    )


def _raw_input(height: int, width: int, fps: int) -> list[str]:
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    return ["-hide_banner", "-nostdin", "-loglevel", "error", "-y", *raw]


def _png_options() -> list[str]:
    return [
        "-frames:v",
        "1",
        "-c:v",
        "png",
        "-pix_fmt",
        "rgb24",
        "-threads",
        "1",
        *_BITEXACT,
        "-f",
        "image2",
        "-update",
        "1",
    ]


def _h264_options(crf: int, preset: str, threads: int) -> list[str]:
    codec = ["-c:v", "libx264", "-crf", str(crf), "-preset", preset, "-threads", str(threads)]
    return ["-an", "-vf", _TO_YUV420, *codec, *_BITEXACT, "-movflags", "+faststart", "-f", "mp4"]


def _feed(encoder: _Encoder, frames: Iterable[np.ndarray], frame_shape: tuple[int, int, int], num_frames: int) -> str:
    """Writes every chunk and returns the sha256 of all of them; raises ValueError unless they are as announced."""
    digest = hashlib.sha256()
    written = 0
    for chunk in frames:
        if chunk.dtype != np.uint8 or chunk.shape[1:] != frame_shape:
            raise ValueError(f"frames are {chunk.dtype} {chunk.shape[1:]}, announced were uint8 {frame_shape}")
        written += len(chunk)
        if written > num_frames:
            raise ValueError(f"at least {written} frames came, announced were {num_frames}")
        if len(chunk):
            raw = np.ascontiguousarray(chunk).data.cast("B")
            digest.update(raw)
            encoder.write(raw)
    if written != num_frames:
        raise ValueError(f"only {written} frames came, announced were {num_frames}")
    return digest.hexdigest()


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
