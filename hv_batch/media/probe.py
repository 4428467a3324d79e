"""Reading a media file back: whether ffmpeg decodes it from end to end, and what it shows."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg

from hv_batch.job.inspection.verify import MediaShape

# A frame of 1280x720 takes a core some milliseconds; a decoder that says nothing for so long is stuck.
DECODE_TIMEOUT_S = 600.0


def decode_media(data: bytes, suffix: str) -> MediaShape:
    """What the file shows. Raises ValueError with ffmpeg's words when it does not decode without an error."""
    # A file, not a pipe: an mp4 whose index is at its end cannot be read from a pipe.
    with tempfile.NamedTemporaryFile(prefix="hv_batch-verify-", suffix=suffix) as file:
        file.write(data)
        file.flush()
        return _decode_file(Path(file.name))


def _decode_file(path: Path) -> MediaShape:
    decode = ["-hide_banner", "-nostdin", "-v", "error", "-xerror", "-threads", "1", "-i", f"file:{path}"]
    # One line a frame with its checksum, after a header that holds the size; nothing is encoded.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *decode, "-map", "0:v:0", "-f", "framecrc", "pipe:1"]
    try:
        told = subprocess.run(command, capture_output=True, timeout=DECODE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"ffmpeg had not decoded it after {DECODE_TIMEOUT_S:g} s") from error
    said = told.stderr.decode(errors="replace").replace(str(path), "the file").strip()
    if told.returncode != 0 or said:
        raise ValueError(said.partition("\n")[0] or f"ffmpeg ended with status {told.returncode}")
    lines = told.stdout.decode().splitlines()
    sizes = [match for line in lines if (match := re.fullmatch(r"#dimensions 0: (\d+)x(\d+)", line))]
    if not sizes:
        raise ValueError("ffmpeg found no picture in it")
    frames = sum(not line.startswith("#") for line in lines)
    return MediaShape(num_frames=frames, height=int(sizes[0][2]), width=int(sizes[0][1]))
