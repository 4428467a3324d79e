"""Check that ffmpeg on this machine can write the files of a run, by writing a small one (P6)."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Set
from pathlib import Path

import numpy as np

from hv_batch.job.config.sections import MediaConfig
from hv_batch.media.codecs import encoder_name, encoders
from hv_batch.media.ffmpeg import FfmpegError, find_ffmpeg, kill_ffmpeg, start_ffmpeg
from hv_batch.media.writer import write_media

# A healthy ffmpeg needs a second at most. A busy machine may need several times as long; one that hangs does not end.
CHECK_TIMEOUT_S = 60.0

SIDE = 64  # pixels; the smallest frame that all encoders take


def check_encoder(media: MediaConfig) -> None:
    """Encode one frame with the settings of `media`.

    Raises FfmpegError if ffmpeg is missing, lacks the encoder, fails, or does not end within CHECK_TIMEOUT_S seconds.
    Raises OSError if the temporary folder cannot be written.
    """
    ffmpeg, wanted = find_ffmpeg(), encoder_name(media)
    name = f"media.codec = {media.codec}{' with media.lossless' if media.lossless else ''}"
    available = available_encoders(ffmpeg)
    if wanted not in available:
        codecs = [codec for codec, encoder in encoders(media).items() if encoder in available]
        raise FfmpegError(
            f"{name} needs the encoder {wanted}, which {ffmpeg} lacks. Codecs available with this ffmpeg: "
            f"{', '.join(codecs) or 'none'}. Choose another codec, or set IMAGEIO_FFMPEG_EXE on every node to an "
            "ffmpeg that has the encoder."
        )
    frames = np.zeros((2, SIDE, SIDE, 3), np.uint8)  # one frame alone would become a PNG
    try:
        with tempfile.TemporaryDirectory(prefix="hv_batch-check-") as folder:
            write_media(
                [frames],
                Path(folder) / "check",
                height=SIDE,
                width=SIDE,
                num_frames=len(frames),
                fps=24,
                media=media,
                exit_timeout_s=CHECK_TIMEOUT_S,
            )
    except FfmpegError as error:
        raise FfmpegError(
            f"{name}: a test with black frames of {SIDE}x{SIDE} failed: {error}. Set IMAGEIO_FFMPEG_EXE on every node "
            "to an ffmpeg that works, or choose another codec."
        ) from error


def available_encoders(ffmpeg: str) -> Set[str]:
    """The names of the encoders that this ffmpeg lists. Raises FfmpegError."""
    with start_ffmpeg(
        ["-hide_banner", "-encoders"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            listing, _ = process.communicate(timeout=CHECK_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            kill_ffmpeg(process)
            raise FfmpegError(
                f"The ffmpeg {ffmpeg} did not list its encoders within {CHECK_TIMEOUT_S:g} s. Set IMAGEIO_FFMPEG_EXE "
                "on every node to an ffmpeg that works."
            ) from None
    return {line.split()[1] for line in listing.decode(errors="replace").splitlines() if len(line.split()) > 1}
