"""Read a media file back: check that ffmpeg decodes it completely, and return its frame count and size."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from hv_batch.job.inspection.verify import MediaShape
from hv_batch.media.ffmpeg import REMEDY, FfmpegError, kill_ffmpeg, start_ffmpeg

# A 1280x720 frame takes some milliseconds on one core; a decode that takes longer than this hangs.
DECODE_TIMEOUT_S = 600.0

# ffmpeg's demuxer of each file type that is written. ffmpeg would choose one by the content of the file, and a file of
# an output root may have any content: a playlist, for example, makes ffmpeg read other files.
DEMUXERS = {".mp4": "mov", ".png": "png_pipe"}

# Two grey frames of 32x32 in H.264. Before a file counts as damaged, ffmpeg must decode this one: a broken ffmpeg must
# neither quarantine samples nor make `verify --repair` remove whole videos.
WHOLE = Path(__file__).with_name("whole.mp4")

# What ffmpeg says of a file that another ffmpeg decodes.
NO_DECODER = re.compile(r"no decoder found for: (?:h264|hevc|av1|png)\b")


def decode_media(data: bytes, suffix: str) -> MediaShape:
    """Return frame count, height and width.

    Raises ValueError with ffmpeg's message if the decode has an error, or if the content is not of the type that
    `suffix` names. Raises FfmpegError if ffmpeg cannot be started, lacks the decoder, or decodes no file at all.
    """
    if suffix not in DEMUXERS:
        raise ValueError(f"a file name that ends in {suffix!r}; allowed: {', '.join(DEMUXERS)}")
    # A file, because an mp4 whose index is at its end cannot be read from a pipe.
    with tempfile.NamedTemporaryFile(prefix="hv_batch-verify-", suffix=suffix) as file:
        file.write(data)
        file.flush()
        try:
            return _decode_file(Path(file.name), DEMUXERS[suffix])
        except ValueError as error:
            _check_decoder(str(error))
            raise


def _check_decoder(problem: str) -> None:
    """Raises FfmpegError if ffmpeg, not the file, is the cause of a failed decode."""
    if not NO_DECODER.search(problem):
        try:
            _decode_file(WHOLE, DEMUXERS[WHOLE.suffix])
            return
        except ValueError as error:
            problem = f"a file that is known to be whole: {error}"
    raise FfmpegError(f"The ffmpeg of this machine cannot decode the files of a run: {problem}. {REMEDY}")


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
