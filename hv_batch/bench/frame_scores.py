"""Measures what the scores of decoded frames cost beside the encode: `python -m hv_batch.bench.frame_scores`.

A decode on a GPU takes longer than the encode, so the share of decode and encode together is smaller.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hv_batch.job.config.sections import MediaConfig
from hv_batch.media.frame_scores import FrameScorer
from hv_batch.media.writer import write_media

HEIGHT, WIDTH, FRAMES, CHUNK = 720, 1280, 129, 4


def moving_waves() -> Iterator[np.ndarray]:
    """Frames with motion and some noise, uint8 [CHUNK, HEIGHT, WIDTH, 3] each, the last one shorter."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    grain = np.random.default_rng(0).normal(0, 2, (HEIGHT, WIDTH, 3)).astype(np.float32)
    for first in range(0, FRAMES, CHUNK):
        times = range(first, min(FRAMES, first + CHUNK))
        waves = [[np.sin(x / 60 + t / 9), np.cos(y / 45 - t / 15), np.sin((x + 2 * y) / 120 - t / 7)] for t in times]
        frames = np.stack([np.stack(wave, axis=-1) * 110 + 127 + grain for wave in waves])
        yield frames.clip(0, 255).astype(np.uint8)


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure() -> dict[str, float]:
    """CPU seconds of the scores and of the encode of one video with the default settings, and their quotient."""
    chunks = list(moving_waves())
    begun = time.process_time()
    scorer = FrameScorer()
    for chunk in chunks:
        scorer.add(chunk)
    scorer.scores()
    scores = time.process_time() - begun
    begun = _children_seconds()
    with tempfile.TemporaryDirectory() as folder:
        size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "fps": 24}
        write_media(chunks, Path(folder) / "video", **size, media=MediaConfig(poster=False))
    encode = _children_seconds() - begun  # of ffmpeg, which has ended
    return {"scores_s": round(scores, 3), "encode_s": round(encode, 3), "share": round(scores / encode, 4)}


if __name__ == "__main__":
    print(json.dumps(measure()))
