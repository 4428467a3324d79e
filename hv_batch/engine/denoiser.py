"""What `HunyuanVideo` hands out loaded: one rank of a group with its model, and the VAE that may be beside it."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from hv_batch.engine import sampler
from hv_batch.engine.decoder import HunyuanDecoder
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.sampler import SamplingOptions
from hv_batch.engine.self_check import check_group
from hv_batch.engine.text_encoders import TextEmbedding
from hv_batch.protocol import NonFiniteError, OnStep, SamplingParams, StepState


class HunyuanDenoiser:
    """One rank of a group with its model (satisfies `hv_batch.protocol.Denoiser`)."""

    def __init__(
        self,
        model: HYVideoDiT,
        mesh: SequenceMesh,
        device: torch.device,
        recipe: SamplingOptions = SamplingOptions(),
        decoder: HunyuanDecoder | None = None,
    ) -> None:
        self._model = model
        self._mesh = mesh
        self._device = device
        self._recipe = recipe
        self._decoder = decoder

    def self_check(self) -> None:
        """Raises DeviceError where the group's ranks compute another picture than one alone; see `self_check`."""
        check_group(self._model, self._mesh, self._device)
        if self._decoder:
            self._decoder.self_check()

    def decode(self, latents: np.ndarray) -> Generator[np.ndarray, None, None]:
        """What `HunyuanDecoder.decode` yields, on rank 0; nothing elsewhere."""
        assert self._decoder, "joined without RankPlace.decodes"
        return self._decoder.decode(latents)

    def trajectory(
        self,
        batch: Sequence[SamplingParams],
        positives: Sequence[TextEmbedding],
        negatives: Sequence[TextEmbedding] | None,
    ) -> Generator[Tensor, None, None]:
        """The latents of videos that are denoised side by side, after each step; see `sampler.trajectory`."""
        return sampler.trajectory(
            self._model, batch, positives, negatives, mesh=self._mesh, device=self._device, recipe=self._recipe
        )

    def denoise(
        self,
        params: SamplingParams,
        positive: TextEmbedding,
        negative: TextEmbedding | None,
        on_step: OnStep,
        resume: StepState | None = None,
    ) -> np.ndarray:
        """Final latents, float32, shaped `params.latent_shape`; see `sampler.denoise`.

        Where these are not finite the group proves itself again: raises DeviceError where it fails to.
        """

        def told(done: int, latents: Tensor) -> None:
            on_step(done, (lambda: latents.cpu().numpy()) if self._recipe.can_resume(done) else None)

        try:
            latents = sampler.denoise(
                self._model,
                params,
                positive,
                negative,
                mesh=self._mesh,
                device=self._device,
                on_step=told,
                recipe=self._recipe,
                resume=resume,
            )
        except NonFiniteError:
            check_group(self._model, self._mesh, self._device)
            raise
        return latents.cpu().numpy()
