"""P3: equal frames and settings give equal files, whatever memory holds and whichever instructions the CPU has.

Only a CPU with AVX-512 shows that libx264 reads uninitialised memory: there, each of the two measures against it is
tested without the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest

from hv_batch.job.config.sections import MediaConfig
from hv_batch.media import ffmpeg
from hv_batch.media.codecs import video_options
from hv_batch.media.ffmpeg import encoder_environment, instruction_set
from hv_batch.media.writer import write_media

FILL_BYTES = ("0", "1", "85", "170")  # values of MALLOC_PERTURB_; 0 leaves memory as it is
RELEASED = [(544, 960), (624, 832), (720, 720), (720, 1280), (832, 1104), (960, 960)]
SMALL = [(160, 96), (144, 160)]  # the macroblock tree of libx264 is affected at these sizes as well


def _with_transposed(sizes):
    return list(dict.fromkeys(chain.from_iterable(((h, w), (w, h)) for h, w in sizes)))


def _video(num_frames: int, height: int, width: int) -> np.ndarray:
    """Return a texture that moves over a smooth picture, so that the encoder has something to decide."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([np.sin(x / 20), np.cos(y / 15), np.sin((x + 2 * y) / 40)], axis=-1) * 80 + 100
    texture = np.random.default_rng(5).random((height + 4 * num_frames, width + 4 * num_frames, 3)) * 55
    moved = [smooth + texture[2 * i : 2 * i + height, 3 * i : 3 * i + width] for i in range(num_frames)]
    return np.stack(moved).astype(np.uint8)


def _files(folder, height: int, width: int, media: MediaConfig, name: str = "clip") -> tuple[bytes, bytes]:
    """Return the bytes of a video of nine frames and of its poster."""
    frames = _video(9, height, width)
    media = media.model_copy(update={"poster": True})
    info = write_media([frames], folder / name, height=height, width=width, num_frames=9, fps=24, media=media)
    return info.path.read_bytes(), info.poster.path.read_bytes()


@pytest.fixture(params=["AVX2 alone", "zeroed memory alone"])
def one_measure(request, monkeypatch):
    """Only one of the two measures is taken. Yields a function that sets the fill byte of fresh memory."""
    if request.param == "AVX2 alone":
        return lambda value: monkeypatch.setattr(ffmpeg, "_ZEROED_MEMORY", {"MALLOC_PERTURB_": value})
    monkeypatch.setattr(ffmpeg, "_cpu_has_avx2", lambda: False)
    return lambda value: monkeypatch.setenv("MALLOC_PERTURB_", value)


def _check_fill_bytes(folder, size, media, fill):
    found = set()
    for value in FILL_BYTES:
        fill(value)
        found.add(_files(folder, *size, media))
    assert len(found) == 1


@pytest.mark.parametrize("size", SMALL, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_content_of_memory_changes_no_file(tmp_path, size, one_measure):
    """P3: small sizes, with several threads; the released sizes are in the slow tests."""
    _check_fill_bytes(tmp_path, size, MediaConfig(preset="medium"), one_measure)


@pytest.mark.slow
@pytest.mark.parametrize("size", _with_transposed(RELEASED), ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_content_of_memory_changes_no_file_of_a_released_size(tmp_path, size, one_measure):
    """P3: every released size, with the default settings."""
    _check_fill_bytes(tmp_path, size, MediaConfig(), one_measure)


@pytest.mark.slow
@pytest.mark.parametrize("lossless", [False, True], ids=["lossy", "lossless"])
@pytest.mark.parametrize("codec", ["h264", "h265", "av1"])
def test_the_content_of_memory_changes_no_file_of_any_codec(tmp_path, codec, lossless, one_measure):
    """P3: every encoder."""
    _check_fill_bytes(tmp_path, (160, 96), MediaConfig(codec=codec, lossless=lossless), one_measure)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["h264", "h265", "av1"])
def test_load_changes_no_file(tmp_path, codec):
    """P3: many encoders at once on few cores, so that the threads of each are scheduled in many orders."""
    media = MediaConfig(codec=codec, preset="fast", threads=4)
    with ThreadPoolExecutor(6) as pool:
        files = list(pool.map(lambda i: _files(tmp_path, 544, 960, media, f"clip-{i}"), range(24)))
    assert len(set(files)) == 1


_DIRTIES_MEMORY = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.aligned_alloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
allocations = [lambda n: libc.malloc(ctypes.c_size_t(n)), lambda n: libc.aligned_alloc(64, ctypes.c_size_t(n))]
dirty = 0
for size in (16, 24, 1000, 1040, 5000, 60_000, 120_000):
    for allocate in allocations:
        for _ in range(2):
            blocks = [allocate(size) for _ in range(20)]
            dirty += sum(bool(ctypes.string_at(block, size).strip(b"\\0")) for block in blocks)
            for block in blocks:
                ctypes.memset(block, 0xAB, size)
            for block in blocks:
                libc.free(block)
print(dirty)
"""


def _dirty_allocations(environment) -> int:
    run = subprocess.run([sys.executable, "-c", _DIRTIES_MEMORY], env=environment, capture_output=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_the_memory_of_an_encoder_is_zeroed(monkeypatch):
    """P3: small and large blocks, aligned or not, also if the operator has set glibc's tunables."""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1:glibc.malloc.tcache_count=9")
    assert _dirty_allocations(os.environ) > 0
    assert _dirty_allocations(encoder_environment()) == 0


@pytest.mark.parametrize(
    ("cpuinfo", "chosen"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx avx2 avx512f avx512bw\n", "avx2"),
        ("processor : 0\nflags\t\t: fpu sse2 avx avx2\n", "avx2"),
        ("processor : 0\nflags\t\t: fpu sse2 avx\n", None),
        ("processor : 0\nFeatures\t: fp asimd sve\n", None),
        (None, None),
    ],
    ids=["AVX-512", "AVX2", "AVX", "ARM", "not Linux"],
)
def test_nodes_with_and_without_avx512_encode_with_avx2(tmp_path, monkeypatch, cpuinfo, chosen):
    """P3: no encoder uses AVX-512, and none uses AVX2 on a CPU without it, where the process would be killed."""
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(ffmpeg, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(ffmpeg, "_cpu_has_avx2", ffmpeg._cpu_has_avx2.__wrapped__)
    assert instruction_set() == chosen
    for codec in ("h264", "h265", "av1"):
        assert ("asm=avx2" in " ".join(video_options(MediaConfig(codec=codec)))) is (chosen is not None)
