"""Batches of training scenes, prepared by all CPU cores while a GPU computes.

Scene `number` of a series depends only on the seed of the series and on `number`, so the batches do not depend on the
number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hv_batch.toy.captions import captioned_scenes
from hv_batch.toy.world import Scene

VIDEO_FRAMES = 33


@dataclass(frozen=True, slots=True)
class Phase:
    """`steps` training steps with batches of one shape."""

    steps: int
    batch: int
    num_frames: int
    height: int
    width: int


class Scenes(Dataset[Any]):
    """`count` training scenes (none is held out); each item is the result of `make(scene, rng)`."""

    def __init__(
        self, seed: int, count: int, num_frames: int, make: Callable[[Scene, np.random.Generator], Any]
    ) -> None:
        self._seed, self._count, self._num_frames, self._make = seed, count, num_frames, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Any:
        scene, _ = next(captioned_scenes((self._seed, number), self._num_frames, held_out=False))
        return self._make(scene, np.random.default_rng((self._seed, number, 1)))


def batches(
    scenes: Scenes, size: int, device: torch.device, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[Any]:
    """Yield all scenes in order in batches of `size`. The default for `collate` is PyTorch's."""
    workers = max(0, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0
    context = "fork" if workers else None  # `make` need not be picklable
    return iter(DataLoader(scenes, size, num_workers=workers, collate_fn=collate, multiprocessing_context=context))


def to_pixels(frames: Tensor, device: torch.device) -> Tensor:
    """Convert uint8 frames [B, F, H, W, 3] to float32 pixels [B, 3, F, H, W] in [-1, 1]."""
    return frames.to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
