"""Read a media file back: check that ffmpeg decodes it completely, and return its frame count and size."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg

from hv_batch.job.inspection.verify import MediaShape

# A 1280x720 frame takes some milliseconds on one core; a decode that takes longer than this hangs.
DECODE_TIMEOUT_S = 600.0


def decode_media(data: bytes, suffix: str) -> MediaShape:
    """Return frame count, height and width. Raises ValueError with ffmpeg's message if the decode has an error."""
    # A file, because an mp4 whose index is at its end cannot be read from a pipe.
    with tempfile.NamedTemporaryFile(prefix="hv_batch-verify-", suffix=suffix) as file:
        file.write(data)
        file.flush()
        return _decode_file(Path(file.name))


def _decode_file(path: Path) -> MediaShape:
    decode = ["-hide_banner", "-nostdin", "-v", "error", "-xerror", "-threads", "1", "-i", f"file:{path}"]
    # The output is a header with the size, then one line per frame with its checksum; nothing is encoded.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *decode, "-map", "0:v:0", "-f", "framecrc", "pipe:1"]
    try:
        process = subprocess.run(command, capture_output=True, timeout=DECODE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"ffmpeg did not finish decoding within {DECODE_TIMEOUT_S:g} s") from error
    stderr = process.stderr.decode(errors="replace").replace(str(path), "the file").strip()
    if process.returncode != 0 or stderr:
        raise ValueError(stderr.partition("\n")[0] or f"ffmpeg exited with status {process.returncode}")
    lines = process.stdout.decode().splitlines()
    sizes = [match for line in lines if (match := re.fullmatch(r"#dimensions 0: (\d+)x(\d+)", line))]
    if not sizes:
        raise ValueError("the file has no video stream")
    frames = sum(not line.startswith("#") for line in lines)
    return MediaShape(num_frames=frames, height=int(sizes[0][2]), width=int(sizes[0][1]))
