"""Reading media files back, whatever their content is (P1)."""

from __future__ import annotations

import numpy as np
import pytest

from hv_batch.job.config.sections import MediaConfig
from hv_batch.job.inspection.verify import MediaShape
from hv_batch.media.ffmpeg import FfmpegError
from hv_batch.media.probe import decode_media
from hv_batch.media.writer import write_media

NOT_THE_FORMAT = "moov atom not found|Invalid PNG signature|no video stream"


def _media(folder, num_frames: int) -> bytes:
    frames = np.full((num_frames, 48, 64, 3), 90, np.uint8)
    media = MediaConfig(preset="ultrafast")
    info = write_media([frames], folder / "m", height=48, width=64, num_frames=num_frames, fps=24, media=media)
    return info.path.read_bytes()


def test_the_shape_of_each_format_is_read(tmp_path):
    """P1: an mp4 and a PNG, as they are written."""
    assert decode_media(_media(tmp_path, 5), ".mp4") == MediaShape(num_frames=5, height=48, width=64)
    assert decode_media(_media(tmp_path, 1), ".png") == MediaShape(num_frames=1, height=48, width=64)


def test_a_file_is_read_only_as_the_format_that_its_name_says(tmp_path):
    """A file of an output root is data: ffmpeg must not read another file because a playlist or a script names it."""
    (tmp_path / "secret.mp4").write_bytes(_media(tmp_path, 5))
    target = tmp_path / "secret.mp4"
    contents = [
        f"ffconcat version 1.0\nfile 'file:{target}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:{target}\n#EXT-X-ENDLIST\n",
        "YUV4MPEG2 W64 H48 F24:1 C420\nFRAME\n" + "a" * 4608,
    ]
    for content in contents:
        for suffix in (".mp4", ".png"):
            with pytest.raises(ValueError, match=NOT_THE_FORMAT):
                decode_media(content.encode(), suffix)


def test_other_formats_are_not_read(tmp_path):
    """Content and name must agree, and the name must be of a format that is written."""
    with pytest.raises(ValueError, match=NOT_THE_FORMAT):
        decode_media(_media(tmp_path, 1), ".mp4")
    with pytest.raises(ValueError, match=NOT_THE_FORMAT):
        decode_media(_media(tmp_path, 5), ".png")
    with pytest.raises(ValueError, match=r"'\.avi'; allowed: \.mp4, \.png"):
        decode_media(_media(tmp_path, 5), ".avi")


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_a_broken_ffmpeg_does_not_make_a_file_damaged(tmp_path, monkeypatch, suffix):
    """P1, P5: a file that no ffmpeg of this machine can read is not removed, and its sample is not to blame."""
    data = _media(tmp_path, 1 if suffix == ".png" else 5)
    script = tmp_path / "ffmpeg"
    script.write_text('#!/bin/sh\necho "Illegal instruction" >&2\nexit 132\n')
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    with pytest.raises(FfmpegError, match=r"known to be whole: Illegal instruction.*IMAGEIO_FFMPEG_EXE"):
        decode_media(data, suffix)


def test_an_ffmpeg_without_the_decoder_does_not_make_a_file_damaged(tmp_path, monkeypatch):
    """P1, P5: as above, for a build of ffmpeg that lacks the decoder of this file only."""
    data, script = _media(tmp_path, 5), tmp_path / "ffmpeg"
    script.write_text('#!/bin/sh\necho "Decoding requested, but no decoder found for: h264" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    with pytest.raises(FfmpegError, match="no decoder found for: h264"):
        decode_media(data, ".mp4")
