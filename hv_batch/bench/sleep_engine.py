"""An engine that sleeps instead of computing, so that the remaining time of a run is the overhead of the job."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hv_batch.protocol import Device, OnStep, ParallelPlan, RankSpec, StepState
from hv_batch.sampling_params import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, SamplingParams, Shape

if TYPE_CHECKING:
    from hv_batch.protocol import Engine


@dataclass(frozen=True, slots=True)
class SleepEmbedding:
    num_tokens: int = 1
    tokens_lost: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepEngine:
    """Implements `hv_batch.protocol.Engine`. A denoise step sleeps for `step_seconds`; all else returns immediately."""

    step_seconds: float = 0.0

    def check(self) -> list[str]:
        return []

    def identity(self) -> dict[str, Any]:
        return {"engine": "idle"}

    def group_problems(self, _plan: ParallelPlan, _shapes: Iterable[Shape] = ()) -> list[str]:
        return []

    def text_encoder(self, _device: Device) -> SleepEncoder:
        return SleepEncoder()

    def host_rendezvous(self, host: str, _world_size: int) -> str:
        return host

    def join(self, place: RankSpec) -> SleepDenoiser:
        return SleepDenoiser(self.step_seconds, place.rank)

    def decoder(self, _device: Device) -> SleepDecoder:
        return SleepDecoder()


class SleepEncoder:
    def encode(self, prompts: Sequence[str], *, image: bool) -> list[SleepEmbedding]:
        return [SleepEmbedding()] * len(prompts)


@dataclass(frozen=True, slots=True)
class SleepDenoiser:
    step_seconds: float
    rank: int

    def self_check(self) -> None:
        """Always passes."""

    def denoise(
        self,
        params: SamplingParams,
        positive: Any,
        negative: Any | None,
        on_step: OnStep,
        resume: StepState | None = None,
    ) -> np.ndarray:
        """Return random latents of `params.latent_shape` that differ by seed, so media files have distinct names."""
        latents = np.random.default_rng(params.seed).random(params.latent_shape, np.float32)
        for step in range(resume.step if resume else 0, params.num_inference_steps):
            time.sleep(self.step_seconds)
            on_step(step + 1, partial(StepState, step + 1, latents))
        return latents

    def decode(self, latents: np.ndarray) -> Generator[np.ndarray, None, None]:
        if self.rank == 0:
            yield from SleepDecoder().decode(latents)


class SleepDecoder:
    def decode(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        _, frames, height, width = latents.shape
        levels = (latents[0, 0] * 255).astype(np.uint8)
        pixels = levels.repeat(SPATIAL_COMPRESSION, 0).repeat(SPATIAL_COMPRESSION, 1)
        count = (frames - 1) * TEMPORAL_COMPRESSION + 1
        shape = (count, height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION, 3)
        yield np.broadcast_to(pixels[None, :, :, None], shape)


if TYPE_CHECKING:
    _: type[Engine] = SleepEngine
