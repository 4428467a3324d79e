"""Scores of decoded frames, computed while they are encoded.

Only sums of integers are accumulated, so the scores depend neither on the order of additions, nor on the chunks in
which the frames arrive, nor on the CPU (P3). Of each frame, a grid of about 180 x 320 pixels is read: at 720p one pixel
in 16, which costs little beside the encode (`python -m hv_batch.bench.frame_scores`).
"""

from __future__ import annotations

import math

import numpy as np

GRID = 180  # at least this many rows and columns of pixels are read, if the frame has them
BLACK, WHITE = 4, 251  # luma at or beyond which a pixel is clipped
# Two frames are nearly identical if fewer pixels than CHANGED_SHARE differ by more than CHANGE: more than the noise of
# a decoder, and less than an object of 4 % of the frame's height and width that moves.
CHANGE, CHANGED_SHARE = 8, 0.001
DIGITS = 6  # of a score in a record


class FrameScorer:
    """Accumulates the scores of the frames of one video. At least one frame must be added."""

    def __init__(self) -> None:
        self._previous: np.ndarray | None = None  # luma of the last frame, int16 [h, w]
        # The last frame that was not nearly identical to the one before. Frames are compared with it, so that small
        # changes add up: slow motion is not taken for a still picture.
        self._anchor: np.ndarray | None = None
        self._pixels = self._sum = self._squares = self._clipped = 0
        self._frames = self._still = self._motion = 0

    def add(self, frames: np.ndarray) -> None:
        """Add uint8 RGB frames [n, height, width, 3]. The frames are not changed, and not kept."""
        step = max(1, min(frames.shape[1:3]) // GRID)
        for frame in frames[:, ::step, ::step]:
            self._add_luma(_luma(frame))

    def _add_luma(self, luma: np.ndarray) -> None:
        counts = np.bincount(luma.ravel(), minlength=256)
        self._pixels += luma.size
        self._sum += int(counts @ _LEVELS)
        self._squares += int(counts @ _LEVELS**2)
        self._clipped += int(counts[: BLACK + 1].sum() + counts[WHITE:].sum())
        self._frames += 1
        if self._previous is None or self._anchor is None:
            self._anchor = luma
        else:
            self._motion += int(_differences(luma, self._previous) @ _LEVELS**2)
            changed = int(_differences(luma, self._anchor)[CHANGE + 1 :].sum())
            if changed < CHANGED_SHARE * luma.size:
                self._still += 1
            else:
                self._anchor = luma
        self._previous = luma

    def scores(self) -> dict[str, float]:
        """The scores by the names of `hv_batch.job.quality.SCORES`: finite numbers, also of a single frame."""
        pixels, pairs = self._pixels, max(1, self._frames - 1)
        variance = (pixels * self._squares - self._sum**2) / pixels**2  # the numerator is exact: Python's integers
        scores = {
            "luma_mean": self._sum / pixels,
            "luma_spread": math.sqrt(variance),
            "clipped_share": self._clipped / pixels,
            "still_share": self._still / pairs,
            "motion_energy": self._motion / (pairs * (pixels // self._frames)),
        }
        return {name: round(value, DIGITS) for name, value in scores.items()}


_LEVELS = np.arange(256, dtype=np.int64)


def _differences(luma: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The number of pixels by their absolute difference, 0 to 255."""
    return np.bincount(np.abs(luma - other).ravel(), minlength=256)


def _luma(frame: np.ndarray) -> np.ndarray:
    """Luma of BT.601 in integer arithmetic: int16 [h, w], 0 to 255."""
    red, green, blue = (frame[..., channel].astype(np.uint32) for channel in range(3))
    luma: np.ndarray = ((77 * red + 150 * green + 29 * blue + 128) >> 8).astype(np.int16)
    return luma
