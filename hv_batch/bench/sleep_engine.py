"""An engine that sleeps where a model would compute: what is left of a run's time is the job's own."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hv_batch.protocol import (
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    Device,
    OnStep,
    ParallelPlan,
    RankSpec,
    SamplingParams,
    Shape,
    StepState,
)

if TYPE_CHECKING:
    from hv_batch.protocol import Engine


@dataclass(frozen=True, slots=True)
class IdleEmbedding:
    num_tokens: int = 1
    tokens_lost: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepEngine:
    """Satisfies `hv_batch.protocol.Engine`; a step takes `step_seconds`, all else no time."""

    step_seconds: float = 0.0

    def check(self) -> list[str]:
        return []

    def identity(self) -> dict[str, Any]:
        return {"engine": "idle"}

    def group_problems(self, _plan: ParallelPlan, _shapes: Iterable[Shape] = ()) -> list[str]:
        return []

    def text_encoder(self, _device: Device) -> IdleEncoder:
        return IdleEncoder()

    def host_rendezvous(self, host: str, _world_size: int) -> str:
        return host

    def join(self, place: RankSpec) -> IdleDenoiser:
        return IdleDenoiser(self.step_seconds, place.rank)

    def decoder(self, _device: Device) -> IdleDecoder:
        return IdleDecoder()


class IdleEncoder:
    def encode(self, prompts: Sequence[str], *, image: bool) -> list[IdleEmbedding]:
        return [IdleEmbedding()] * len(prompts)


@dataclass(frozen=True, slots=True)
class IdleDenoiser:
    step_seconds: float
    rank: int

    def self_check(self) -> None:
        """There is nothing that could be wrong."""

    def denoise(
        self,
        params: SamplingParams,
        positive: Any,
        negative: Any | None,
        on_step: OnStep,
        resume: StepState | None = None,
    ) -> np.ndarray:
        """Latents that differ from seed to seed, so that no two media have one name."""
        latents = np.random.default_rng(params.seed).random(params.latent_shape, np.float32)
        for step in range(resume.step if resume else 0, params.num_inference_steps):
            time.sleep(self.step_seconds)
            on_step(step + 1, lambda: latents)
        return latents

    def decode(self, latents: np.ndarray) -> Generator[np.ndarray, None, None]:
        if self.rank == 0:
            yield from IdleDecoder().decode(latents)


class IdleDecoder:
    def decode(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        _, frames, height, width = latents.shape
        levels = (latents[0, 0] * 255).astype(np.uint8)
        pixels = levels.repeat(SPATIAL_COMPRESSION, 0).repeat(SPATIAL_COMPRESSION, 1)
        count = (frames - 1) * TEMPORAL_COMPRESSION + 1
        shape = (count, height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION, 3)
        yield np.broadcast_to(pixels[None, :, :, None], shape)


if TYPE_CHECKING:
    _: type[Engine] = SleepEngine
