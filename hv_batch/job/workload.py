"""The quantities that determine the cost of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hv_batch.sampling_params import SIZE_MULTIPLE, TEMPORAL_COMPRESSION, SamplingParams, Shape

TRAINED_FRAMES = 129  # of the released model: 5.4 s at 24 frames per second


@dataclass(frozen=True, slots=True, order=True)
class Workload:
    """The quantities that determine the cost of a sample."""

    shape: Shape
    steps: int
    branches: int  # 2 with classifier-free guidance

    @classmethod
    def of(cls, params: SamplingParams) -> Workload:
        return cls(params.shape, params.num_inference_steps, 2 if params.uses_cfg else 1)

    @property
    def tokens(self) -> int:
        return count_tokens(self.shape)


def count_tokens(shape: Shape) -> int:
    """The number of image tokens of the DiT for one video."""
    height, width, frames = shape
    return ((frames - 1) // TEMPORAL_COMPRESSION + 1) * (height // SIZE_MULTIPLE) * (width // SIZE_MULTIPLE)


def shape_name(shape: Sequence[int]) -> str:
    """The shape as text, for example "720x1280x129"."""
    return "x".join(map(str, shape))


def long_video_warning(shapes: Mapping[Shape, int]) -> str:
    """One sentence about the videos that are longer than the model was trained for; empty if there are none.

    `shapes` has the number of videos of each shape.
    """
    long = {frames: count for (_, _, frames), count in shapes.items() if frames > TRAINED_FRAMES}
    if not long:
        return ""
    return (
        f"{sum(long.values()):,} video(s) have more than {TRAINED_FRAMES} frames (up to {max(long)}): the model was "
        "trained with at most that many, so they may repeat themselves or lose quality"
    )
