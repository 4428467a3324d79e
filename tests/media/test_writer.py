"""hv_batch.media: media files written and read with a real ffmpeg."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hv_batch.job.config.sections import MediaConfig
from hv_batch.media.ffmpeg import FfmpegError
from hv_batch.media.writer import MediaInfo, encode_png, write_media

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
HEIGHT, WIDTH = 48, 64
H264 = MediaConfig(crf=10, preset="veryfast", poster=False)
SETTINGS = {"height": HEIGHT, "width": WIDTH, "fps": 24, "media": H264}


def _video(num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return a smooth moving picture.

    Each channel has another gradient, so that swapped axes or colours are detected.
    """
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 20 + t / 9), np.cos(y / 15), np.sin((x + 2 * y) / 40 - t / 7)]
    return ((np.stack(waves, axis=-1) * 0.45 + 0.5) * 255).astype(np.uint8)


def _decode(path: Path, num_frames: int) -> np.ndarray:
    """Decode to RGB by the colour tags of the file, as players do, but with accurate rounding."""
    exact = "accurate_rnd+full_chroma_int+full_chroma_inp+bicubic"
    raw = subprocess.run(
        [FFMPEG, "-v", "error", "-i", path, "-sws_flags", exact, "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"],
        check=True,
        capture_output=True,
    ).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
    assert len(frames) == num_frames
    return frames


def _probe(path: Path) -> str:
    return subprocess.run([FFMPEG, "-hide_banner", "-i", path], capture_output=True, text=True, check=False).stderr


def _children() -> set[int]:
    """Return the ids of the child processes that are alive or not reaped."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    while True:
        try:
            return {int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()}
        except FileNotFoundError:  # a thread has ended since it was listed
            continue


def test_a_video_round_trips(tmp_path):
    """Spec section 1, step 5: the file is an H.264 mp4 of the given size, rate and pixels, tagged BT.709."""
    frames = _video(25)
    info = write_media(iter([frames[:9], frames[9:10], frames[10:]]), tmp_path / "clip", num_frames=25, **SETTINGS)
    content = info.path.read_bytes()
    assert info == MediaInfo(
        path=tmp_path / "clip.mp4",
        suffix=".mp4",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        frames_sha256=hashlib.sha256(frames.tobytes()).hexdigest(),
        num_frames=25,
        height=HEIGHT,
        width=WIDTH,
        scores=info.scores,
    )
    assert info.scores["luma_mean"] == pytest.approx(127, abs=5)
    probe = _probe(info.path)
    assert re.search(r"Video: h264.*yuv420p\(tv, bt709.*64x48.*24 fps", probe), probe
    assert "Audio" not in probe
    assert content.index(b"moov") < content.index(b"mdat"), "the index must come first (faststart)"
    error = _decode(info.path, 25).astype(float) - frames
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 36
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 1.0, "a colour cast: wrong matrix or range"


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)], ids=str)
def test_pure_colours_are_encoded_with_the_bt709_matrix(tmp_path, colour):
    """P3: the colour tags are correct: Y, Cb and Cr follow the BT.709 limited-range formula."""
    frames = np.broadcast_to(np.array(colour, np.uint8), (5, HEIGHT, WIDTH, 3))
    info = write_media(iter([frames]), tmp_path / "flat", num_frames=5, **SETTINGS)
    raw = subprocess.run(
        [FFMPEG, "-v", "error", "-i", info.path, "-f", "rawvideo", "-pix_fmt", "yuv420p", "pipe:1"],
        check=True,
        capture_output=True,
    ).stdout
    r, g, b = (value / 255 for value in colour)
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    expected = (16 + 219 * luma, 128 + 224 * (b - luma) / 1.8556, 128 + 224 * (r - luma) / 1.5748)
    pixels = HEIGHT * WIDTH
    planes = raw[pixels // 2], raw[pixels + pixels // 8], raw[pixels + pixels // 4 + pixels // 8]
    assert np.abs(np.array(planes) - expected).max() <= 1.5


def test_equal_frames_give_equal_bytes(tmp_path):
    """P3: chunking, time of day and file name do not change the bytes."""
    frames = _video(33)
    one = write_media(iter([frames]), tmp_path / "one", num_frames=33, **SETTINGS)
    other = write_media((frames[i : i + 7] for i in range(0, 33, 7)), tmp_path / "other", num_frames=33, **SETTINGS)
    assert one.path.read_bytes() == other.path.read_bytes()
    assert one.sha256 == other.sha256
    assert one.frames_sha256 == other.frames_sha256


@pytest.mark.parametrize("lossless", [False, True], ids=["lossy", "lossless"])
@pytest.mark.parametrize("codec", ["h264", "h265", "av1"])
class TestCodec:
    """Every codec, with the encoders of the ffmpeg in the package imageio-ffmpeg."""

    def test_equal_frames_give_equal_bytes(self, tmp_path, codec, lossless):
        """P3: this holds with several encoder threads, and a poster does not change the video."""
        frames = _video(9)
        media = MediaConfig(codec=codec, crf=20, preset="veryfast", threads=2, lossless=lossless)
        first, second = (
            write_media(iter([frames]), tmp_path / name, num_frames=9, **{**SETTINGS, "media": settings})
            for name, settings in (("first", media), ("second", media.model_copy(update={"poster": False})))
        )
        assert first.path.read_bytes() == second.path.read_bytes()

    def test_the_file_has_the_requested_format(self, tmp_path, codec, lossless):
        """Design 4: codec and colour tags are as configured; no date or ffmpeg version is written; lossless: exact."""
        frames = _video(9)
        media = MediaConfig(codec=codec, crf=10, preset="veryfast", threads=2, lossless=lossless)
        info = write_media(iter([frames]), tmp_path / "clip", num_frames=9, **{**SETTINGS, "media": media})
        probe, decoded = _probe(info.path), _decode(info.path, 9)
        name = {"h264": "h264", "h265": "hevc", "av1": "av1"}[codec]
        colours = r"gbrp\(pc, gbr/bt709/iec61966-2-1" if lossless else r"yuv420p\(tv, bt709"
        assert re.search(rf"Video: {name}.*{colours}.*64x48.*24 fps", probe), probe
        assert "creation_time" not in probe
        assert not re.search(rb"Lav[fc]\s?\d", info.path.read_bytes())
        if lossless:
            assert hashlib.sha256(decoded.tobytes()).hexdigest() == info.frames_sha256
        else:
            error = decoded.astype(float) - frames
            assert 10 * np.log10(255**2 / np.mean(error**2)) > 33
            assert np.abs(error.mean(axis=(0, 1, 2))).max() < 1.5, "a colour cast: wrong matrix or range"


def test_a_poster_shows_the_first_frame(tmp_path):
    """Design 4: a video has a poster file with equal bytes for equal frames; an image has none."""
    settings = {**SETTINGS, "media": H264.model_copy(update={"poster": True})}
    frames = _video(9)
    one, other = (write_media(iter([frames]), tmp_path / name, num_frames=9, **settings) for name in ("one", "other"))
    assert write_media(iter([frames]), tmp_path / "none", num_frames=9, **SETTINGS).poster is None
    assert one.poster.path == tmp_path / "one.jpg"
    assert one.poster.sha256 == hashlib.sha256(one.poster.path.read_bytes()).hexdigest() == other.poster.sha256
    with Image.open(one.poster.path) as image:
        assert image.format == "JPEG"
        error = np.asarray(image).astype(float) - frames[0]
    assert np.sqrt(np.mean(error**2)) < 6
    assert np.abs(error.mean(axis=(0, 1))).max() < 1.5, "a colour cast: wrong matrix or range"
    assert write_media(iter([frames[:1]]), tmp_path / "image", num_frames=1, **settings).poster is None


def test_a_poster_that_fails_leaves_nothing(tmp_path):
    """P1: incomplete output is deleted."""
    (tmp_path / "clip.jpg").mkdir()
    settings = {**SETTINGS, "media": H264.model_copy(update={"poster": True})}
    with pytest.raises((FfmpegError, OSError)):
        write_media(iter([_video(5)]), tmp_path / "clip", num_frames=5, **settings)
    assert not (tmp_path / "clip.mp4").exists()


def test_one_frame_is_an_exact_png(tmp_path):
    """Spec section 1: one frame is a lossless image, also with odd sizes and special characters in the file name."""
    frame = _video(1, 33, 47)
    sizes = {**SETTINGS, "height": 33, "width": 47}
    info = write_media(iter([frame]), tmp_path / "a %d:b-x", num_frames=1, **sizes)
    assert info.path == tmp_path / "a %d:b-x.png"
    assert info.suffix == ".png"
    with Image.open(info.path) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), frame[0])


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 1, 7, 255]), st.integers(0, 2**32 - 1))
def test_every_png_is_lossless(height, width, contrast, seed):
    """P3: frames of any size and content are exact, and equal frames give equal bytes."""
    frame = np.random.default_rng(seed).integers(0, contrast + 1, (height, width, 3), np.uint8)
    data = encode_png(frame)
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # verifies the checksums of all chunks
        np.testing.assert_array_equal(np.asarray(image), frame)
    assert encode_png(np.asfortranarray(frame)) == data


def test_an_image_starts_no_process(tmp_path, monkeypatch):
    """Design 2: thousands of small images must not start thousands of ffmpeg processes."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert write_media(iter([_video(1)]), tmp_path / "image", num_frames=1, **SETTINGS).path.exists()


def _too_few() -> Iterator[np.ndarray]:
    yield _video(4)


def _too_many() -> Iterator[np.ndarray]:
    yield _video(4)
    yield _video(4)


def _none() -> Iterator[np.ndarray]:
    yield from ()


def _wrong_size() -> Iterator[np.ndarray]:
    yield _video(2)
    yield _video(3, HEIGHT, WIDTH + 16)


def _wrong_type() -> Iterator[np.ndarray]:
    yield _video(5).astype(np.float32)


def _transposed() -> Iterator[np.ndarray]:
    yield _video(5).transpose(0, 2, 1, 3)


def _raises() -> Iterator[np.ndarray]:
    yield _video(2)
    raise ZeroDivisionError("the decoder failed")


def _interrupted() -> Iterator[np.ndarray]:
    yield _video(2)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (_too_few, ValueError),
        (_too_many, ValueError),
        (_none, ValueError),
        (_wrong_size, ValueError),
        (_wrong_type, ValueError),
        (_transposed, ValueError),
        (_raises, ZeroDivisionError),
        (_interrupted, KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_no_file_and_no_process(tmp_path, frames, error):
    """P1: incomplete output is deleted, and the caller gets the original exception."""
    before = _children()
    with pytest.raises(error):
        write_media(frames(), tmp_path / "clip", num_frames=5, **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    assert _children() == before


def test_errors_have_the_message_of_ffmpeg(tmp_path):
    """P5: the record of a failed sample has the reason."""
    with pytest.raises(FfmpegError, match="no-such-preset"):
        write_media(
            (_video(50) for _ in range(20)),
            tmp_path / "clip",
            num_frames=1000,
            **{**SETTINGS, "media": H264.model_copy(update={"preset": "no-such-preset"})},
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("height", "width"), [(16, 4224), (4224, 16)])
def test_an_encoder_that_refuses_a_size_gives_its_own_reason(tmp_path, height, width):
    """P5: libx265's reason is in the message; the manifest check refuses such sizes before."""
    frames = np.zeros((2, height, width, 3), np.uint8)
    with pytest.raises(FfmpegError, match="CTU size 16 is non-compliant"):
        write_media(
            [frames], tmp_path / "c", height=height, width=width, num_frames=2, fps=24, media=MediaConfig(codec="h265")
        )


@pytest.mark.parametrize(("height", "width"), [(16, 4160), (4160, 16), (32, 4224)])
def test_the_largest_sizes_of_the_manifest_check_are_encoded(tmp_path, height, width):
    """P6: the sizes that the manifest check accepts with h265."""
    frames = np.zeros((2, height, width, 3), np.uint8)
    media = MediaConfig(codec="h265", preset="ultrafast")
    assert write_media(
        [frames], tmp_path / "c", height=height, width=width, num_frames=2, fps=24, media=media
    ).path.exists()


def test_a_missing_folder_is_reported_by_path(tmp_path):
    """P5: the error names an output that cannot be opened."""
    with pytest.raises(FfmpegError, match="absent"):
        write_media(iter([_video(5)]), tmp_path / "absent" / "clip", num_frames=5, **SETTINGS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("num_frames", [1, 60])
def test_a_full_disk_raises_enospc(tmp_path, num_frames):
    """Design section 6: a full disk is fatal for the run, not a failure of the sample, so it must be identifiable."""
    noise = np.random.default_rng(0).integers(0, 256, (num_frames, HEIGHT, WIDTH, 3), np.uint8)
    suffix = ".png" if num_frames == 1 else ".mp4"
    (tmp_path / f"clip{suffix}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_media(iter([noise]), tmp_path / "clip", num_frames=num_frames, **SETTINGS)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


_WRITES_UNTIL_KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from hv_batch.job.config.run_config import MediaConfig
from hv_batch.media.writer import write_media

def frames():
    yield np.zeros((3, 48, 64, 3), np.uint8)
    pid = Path("/proc/self/task", str(__import__("os").getpid()), "children").read_text().strip()
    print(pid, flush=True)
    time.sleep(600)

write_media(frames(), Path(sys.argv[1]), height=48, width=64, num_frames=99, fps=24, media=MediaConfig())
"""


def test_ffmpeg_ends_when_the_writer_is_killed(tmp_path):
    """P4: no ffmpeg process remains after a decoder is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", _WRITES_UNTIL_KILLED, tmp_path / "clip"], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        encoder = int(writer.stdout.readline())
        assert Path(f"/proc/{encoder}").exists()
        writer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while _runs(encoder) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(encoder)


def _runs(pid: int) -> bool:
    """Return whether the process is alive. A zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
