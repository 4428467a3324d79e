"""Scenes to learn from, drawn and read by all of the machine's processors while a GPU computes.

Scene `number` of a series depends on the series' seed and on its number alone, so however many processes take part, the
same batches come out.
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

from hv_batch.toy.captions import told_scenes
from hv_batch.toy.world import Scene

VIDEO_FRAMES = 33


@dataclass(frozen=True, slots=True)
class Phase:
    """`steps` steps over batches of one shape."""

    steps: int
    batch: int
    num_frames: int
    height: int
    width: int


class Scenes(Dataset[Any]):
    """`count` scenes that are not held out, each as `make(scene, rng)`."""

    def __init__(
        self, seed: int, count: int, num_frames: int, make: Callable[[Scene, np.random.Generator], Any]
    ) -> None:
        self._seed, self._count, self._num_frames, self._make = seed, count, num_frames, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Any:
        scene, _ = next(told_scenes((self._seed, number), self._num_frames, held_out=False))
        return self._make(scene, np.random.default_rng((self._seed, number, 1)))


def batches(
    scenes: Scenes, size: int, device: torch.device, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[Any]:
    """All scenes in order, `size` at a time; collated as PyTorch does it by default."""
    helpers = max(0, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0
    context = "fork" if helpers else None  # what scenes are made of need not be picklable
    return iter(DataLoader(scenes, size, num_workers=helpers, collate_fn=collate, multiprocessing_context=context))


def to_pixels(frames: Tensor, device: torch.device) -> Tensor:
    """[B, 3, F, H, W] float32 in [-1, 1] of uint8 [B, F, H, W, 3]."""
    return frames.to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
