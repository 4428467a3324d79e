"""hv_batch.media.frame_scores: scores of decoded frames, compared with plain floating-point numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.quality import GOOD, LOOKS, SCORES, describe_looks, look
from hv_batch.media.frame_scores import FrameScorer

seeds = st.integers(0, 2**32 - 1)


def score(frames: np.ndarray) -> dict[str, float]:
    scorer = FrameScorer()
    scorer.add(frames)
    return scorer.scores()


def noise(seed: int, num_frames: int = 5, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def moving_square(num_frames: int = 33, pixels_a_frame: float = 2.0, size: int = 16) -> np.ndarray:
    """A white square that moves over a grey ground."""
    frames = np.full((num_frames, 180, 320, 3), 90, np.uint8)
    for number, frame in enumerate(frames):
        left = round(10 + pixels_a_frame * number)
        frame[80 : 80 + size, left : left + size] = 255
    return frames


@given(seeds, st.integers(1, 5))
def test_scores_are_those_of_their_definition(seed, num_frames):
    frames = noise(seed, num_frames)
    luma = np.round(frames @ np.array([0.299, 0.587, 0.114]))
    found = score(frames)
    assert found["luma_mean"] == pytest.approx(luma.mean(), abs=0.6)
    assert found["luma_spread"] == pytest.approx(luma.std(), abs=0.6)
    changes = np.diff(luma, axis=0)
    energy = (changes**2).mean() if num_frames > 1 else 0.0
    assert found["motion_energy"] == pytest.approx(energy, rel=0.02)


@given(seeds, st.lists(st.integers(1, 8), max_size=4))
def test_equal_frames_have_equal_scores_however_they_arrive(seed, cuts):
    """P3: a decoder on another device yields other chunks."""
    frames = noise(seed, 8)
    scorer = FrameScorer()
    for chunk in np.split(frames, sorted(cuts)):
        scorer.add(chunk)
    assert scorer.scores() == score(frames)


@given(seeds, st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
def test_scores_are_finite_and_in_their_ranges(seed, num_frames, height, width):
    found = score(noise(seed, num_frames, height, width))
    assert found.keys() == SCORES.keys()
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert found["luma_mean"] <= 255
    assert found["luma_spread"] <= 127.5
    assert max(found["clipped_share"], found["still_share"]) <= 1


def test_the_frames_stay_unchanged():
    frames = noise(1)
    before = frames.copy()
    score(frames)
    assert (frames == before).all()


@pytest.mark.parametrize("num_frames", [1, 9])
@pytest.mark.parametrize(("level", "expected"), [(0, "black"), (12, "black"), (255, "white"), (128, "flat")])
def test_an_empty_video_is_recognised(level, expected, num_frames):
    frames = np.full((num_frames, 64, 96, 3), level, np.uint8)
    assert look(score(frames), num_frames) == expected


def test_a_still_video_with_the_noise_of_a_decoder_does_not_move():
    picture = noise(3, 1, 180, 320)[0] // 2 + 60
    shimmer = noise(4, 33, 180, 320) % 5
    frames = (picture + shimmer).astype(np.uint8)
    assert score(frames)["still_share"] == 1.0
    assert look(score(frames), 33) == "still"
    assert look(score(frames[:1]), 1) == GOOD, "an image is never still"


@pytest.mark.parametrize("pixels_a_frame", [2.0, 0.5])
def test_a_small_object_that_moves_is_motion(pixels_a_frame):
    assert look(score(moving_square(pixels_a_frame=pixels_a_frame)), 33) == GOOD


def test_slow_motion_is_motion():
    """A fade changes no pixel by more than the noise of a decoder from one frame to the next, but it adds up."""
    gradient = np.linspace(0, 150, 320, dtype=np.uint8)[None, None, :, None]
    frames = gradient + np.arange(65, dtype=np.uint8)[:, None, None, None]
    assert look(score(np.broadcast_to(frames, (65, 180, 320, 3))), 65) == GOOD


def test_a_night_scene_is_not_black():
    frames = np.full((9, 180, 320, 3), 3, np.uint8)
    frames[:, 40:60, 100:120] = 230
    assert look(score(frames), 9) == "still"


def test_looks_are_summarised_in_one_line():
    assert describe_looks({"black": 12, "still": 3, GOOD: 1985}) == "12 of 2,000 videos look black, 3 do not move"
    assert describe_looks({GOOD: 7}) == "none of 7 videos looks black, white, of one brightness or still"
    assert describe_looks({}) == ""
    assert GOOD not in LOOKS
