"""Read a media file back: check that ffmpeg decodes it completely, and return its frame count and size."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from hv_batch.job.inspection.verify import MediaShape
from hv_batch.media.ffmpeg import kill_ffmpeg, start_ffmpeg

# A 1280x720 frame takes some milliseconds on one core; a decode that takes longer than this hangs.
DECODE_TIMEOUT_S = 600.0

# ffmpeg's demuxer of each file type that is written. ffmpeg would choose one by the content of the file, and a file of
# an output root may have any content: a playlist, for example, makes ffmpeg read other files.
DEMUXERS = {".mp4": "mov", ".png": "png_pipe"}


def decode_media(data: bytes, suffix: str) -> MediaShape:
    """Return frame count, height and width.

    Raises ValueError with ffmpeg's message if the decode has an error, or if the content is not of the type that
    `suffix` names. Raises FfmpegError if ffmpeg cannot be started.
    """
    if suffix not in DEMUXERS:
        raise ValueError(f"a file name that ends in {suffix!r}; allowed: {', '.join(DEMUXERS)}")
    # A file, because an mp4 whose index is at its end cannot be read from a pipe.
    with tempfile.NamedTemporaryFile(prefix="hv_batch-verify-", suffix=suffix) as file:
        file.write(data)
        file.flush()
        return _decode_file(Path(file.name), DEMUXERS[suffix])


def _decode_file(path: Path, demuxer: str) -> MediaShape:
    decode = ["-hide_banner", "-nostdin", "-v", "error", "-xerror", "-threads", "1"]
    pinned = ["-f", demuxer, "-protocol_whitelist", "file", "-i", f"file:{path}"]
    # The output is a header with the size, then one line per frame with its checksum; nothing is encoded.
    command = [*decode, *pinned, "-map", "0:v:0", "-f", "framecrc", "pipe:1"]
    with start_ffmpeg(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            out, err = process.communicate(timeout=DECODE_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            kill_ffmpeg(process)
            raise ValueError(f"ffmpeg did not finish decoding within {DECODE_TIMEOUT_S:g} s") from error
    stderr = err.decode(errors="replace").replace(str(path), "the file").strip()
    if process.returncode != 0 or stderr:
        raise ValueError(stderr.partition("\n")[0] or f"ffmpeg exited with status {process.returncode}")
    lines = out.decode().splitlines()
    sizes = [match for line in lines if (match := re.fullmatch(r"#dimensions 0: (\d+)x(\d+)", line))]
    if not sizes:
        raise ValueError("the file has no video stream")
    frames = sum(not line.startswith("#") for line in lines)
    return MediaShape(num_frames=frames, height=int(sizes[0][2]), width=int(sizes[0][1]))
