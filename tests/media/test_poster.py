"""The poster of a video: a small JPEG of its first frame that is not black."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hv_batch.media.poster import QUALITY, SIDE, PosterFrame, encode_poster


@given(st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=5))
def test_the_first_frame_that_is_not_black(chunks):
    """A fade-in has a black first frame. Without any other frame, the first one is shown."""
    lumas = [luma for chunk in chunks for luma in chunk]
    poster = PosterFrame()
    for chunk in chunks:
        poster.look(np.stack([np.full((17, 9, 3), luma, np.uint8) for luma in chunk]) if chunk else np.empty(0))
    expected = next((luma for luma in lumas if luma > 16), lumas[0] if lumas else None)
    assert (None if poster.frame is None else int(poster.frame[0, 0, 0])) == expected


def test_a_frame_is_copied():
    """The decoder may write the next chunk into the same memory."""
    chunk = np.full((1, 16, 16, 3), 200, np.uint8)
    poster = PosterFrame()
    poster.look(chunk)
    chunk[:] = 0
    assert poster.frame is not None
    assert poster.frame.min() == 200


@pytest.mark.parametrize(
    ("size", "expected"),
    [((720, 1280), (360, 640)), ((1280, 720), (640, 360)), ((960, 960), (SIDE, SIDE)), ((32, 48), (32, 48))],
)
def test_a_poster_is_small(size, expected):
    """P7: at most 640 pixels a side; 40 kB for a picture, and 250 kB for noise, which no JPEG can pack."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    noise = np.random.default_rng(3).normal(0, 8, (*size, 3))
    waves = np.stack([np.sin(x / 20), np.cos(y / 15), np.sin((x + 2 * y) / 40)], -1) * 80 + 100
    for frame, most in ((waves + noise, 60_000), (noise * 16 + 128, 250_000)):
        data = encode_poster(frame.clip(0, 255).astype(np.uint8))
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == ("JPEG", expected[::-1])
        assert len(data) < most
        assert QUALITY == 80, "the sizes above are those of this quality"


def test_colours_are_kept():
    frame = np.zeros((720, 1280, 3), np.uint8)
    frame[:, :640], frame[:, 640:] = (200, 40, 40), (30, 60, 190)
    with Image.open(io.BytesIO(encode_poster(frame))) as image:
        assert np.abs(np.asarray(image).astype(int)[180, 100] - (200, 40, 40)).max() < 4
        assert np.abs(np.asarray(image).astype(int)[180, 540] - (30, 60, 190)).max() < 4
