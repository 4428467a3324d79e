"""The check of a node's ffmpeg, with fakes that are broken in each way (P5, P6)."""

from __future__ import annotations

import time

import imageio_ffmpeg
import pytest

from hv_batch.job.config.sections import MediaConfig
from hv_batch.media import encoder_check
from hv_batch.media.encoder_check import check_encoder
from hv_batch.media.ffmpeg import FfmpegError

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
LISTS = """case "$*" in *-encoders*) echo ' V....D libx264  H.264'; echo ' V....D libaom-av1  AV1'; exit 0;; esac\n"""


@pytest.fixture
def use_ffmpeg(tmp_path, monkeypatch):
    """A function that makes a shell script, or a file with other content, the ffmpeg of this machine."""

    def use(script: str, *, mode: int = 0o755):
        path = tmp_path / "ffmpeg"
        path.write_text(script)
        path.chmod(mode)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
        return path

    return use


@pytest.mark.parametrize("poster", [False, True])
@pytest.mark.parametrize(("codec", "lossless"), [("h264", False), ("h264", True), ("h265", False), ("av1", False)])
def test_a_working_ffmpeg_passes_the_check(codec, lossless, poster):
    """P6: the check accepts every setting that this ffmpeg can encode."""
    check_encoder(MediaConfig(codec=codec, lossless=lossless, poster=poster))


def test_a_missing_encoder_is_reported_at_the_start(use_ffmpeg):
    """P6: before a GPU is allocated, the message has the missing encoder, the available codecs and the remedy."""
    use_ffmpeg(f'#!/bin/sh\n{LISTS}exec {FFMPEG} "$@"\n')
    check_encoder(MediaConfig())
    with pytest.raises(FfmpegError, match=r"media.codec = h265 needs the encoder libx265.*with this ffmpeg: h264\."):
        check_encoder(MediaConfig(codec="h265"))
    with pytest.raises(FfmpegError, match=r"with media.lossless needs the encoder libx264rgb.*with this ffmpeg: av1\."):
        check_encoder(MediaConfig(lossless=True))


def test_an_ffmpeg_that_lists_its_encoder_and_fails_is_reported(use_ffmpeg):
    """P6: the message has ffmpeg's own reason, its path and the remedy."""
    path = use_ffmpeg(f"#!/bin/sh\n{LISTS}echo 'Illegal instruction in libx264' >&2; exit 132\n")
    with pytest.raises(FfmpegError, match=f"(?s){path}.*Illegal instruction in libx264.*IMAGEIO_FFMPEG_EXE"):
        check_encoder(MediaConfig())


@pytest.mark.parametrize("lists", ["", LISTS], ids=["at the list of encoders", "at the encode"])
def test_a_hanging_ffmpeg_ends_the_check(use_ffmpeg, monkeypatch, lists):
    """P5: the check has a time limit, and no process remains."""
    monkeypatch.setattr(encoder_check, "CHECK_TIMEOUT_S", 0.3)
    use_ffmpeg(f"#!/bin/sh\n{lists}sleep 100\n")  # a child, as of a script that starts the real ffmpeg
    begun = time.monotonic()
    with pytest.raises(FfmpegError, match=r"within 0\.3 s"):
        check_encoder(MediaConfig())
    assert time.monotonic() - begun < 30


def test_an_ffmpeg_that_cannot_be_started_is_named(use_ffmpeg, tmp_path, monkeypatch):
    """P6: a missing or non-executable ffmpeg is reported as such, with its path."""
    path = use_ffmpeg("#!/bin/sh\n", mode=0o644)
    with pytest.raises(FfmpegError, match=f"The ffmpeg {path} is not an executable file"):
        check_encoder(MediaConfig())
    use_ffmpeg("no program\n\0")
    with pytest.raises(FfmpegError, match=f"The ffmpeg {path} cannot be started: Exec format error"):
        check_encoder(MediaConfig())
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "absent"))
    with pytest.raises(FfmpegError, match=r"absent does not exist\. Install"):
        check_encoder(MediaConfig())
