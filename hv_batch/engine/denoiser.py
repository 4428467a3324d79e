"""The loaded denoiser: one rank of a group with its DiT, and optionally the VAE for group decoding."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hv_batch.engine.checkpoint.lora.merge import LoraMerger
from hv_batch.engine.decoder import HunyuanDecoder
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.kernel_choice import check_chosen
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.sampling import sampler
from hv_batch.engine.sampling.sampler import FinishedStep, SamplingOptions
from hv_batch.engine.self_check import check_group
from hv_batch.engine.text_encoders import TextEmbedding
from hv_batch.protocol import NonFiniteError, OnStep, StepState, UserError
from hv_batch.sampling_params import SamplingParams


class HunyuanDenoiser:
    """One rank of a denoise group (satisfies `hv_batch.protocol.Denoiser`)."""

    def __init__(
        self,
        model: HYVideoDiT,
        mesh: SequenceMesh,
        device: torch.device,
        options: SamplingOptions = SamplingOptions(),
        decoder: HunyuanDecoder | None = None,
        loras: LoraMerger | None = None,
        choices: Mapping[str, str] | None = None,
    ) -> None:
        self._model = model
        self._mesh = mesh
        self._device = device
        self._options = options
        self._decoder = decoder
        self._loras = loras
        self._choices = dict(choices or {})

    def choices(self) -> Mapping[str, str]:
        """Return the values of the engine's open options with which this rank computes; see `Engine`."""
        return self._choices

    def use_choices(self, choices: Mapping[str, str]) -> None:
        """Compute with other values of the open options. Raises DeviceError if this rank cannot."""
        check_chosen(choices["attention"], self._device, self._model.dtype)
        self._model.attention = choices["attention"]
        self._choices = dict(choices)

    def self_check(self) -> None:
        """Raise DeviceError if the group computes another result than one rank alone; see `hv_batch.engine.self_check`.

        Also checks group decoding if the VAE is loaded.
        """
        check_group(self._model, self._mesh, self._device)
        if self._decoder:
            self._decoder.self_check()

    def decode(self, latents: np.ndarray) -> Generator[np.ndarray, None, None]:
        """On rank 0, yield the same chunks as `HunyuanDecoder.decode`; on other ranks, yield nothing."""
        assert self._decoder, "joined without RankSpec.decodes"
        return self._decoder.decode(latents)

    def trajectory(
        self,
        batch: Sequence[SamplingParams],
        positives: Sequence[TextEmbedding],
        negatives: Sequence[TextEmbedding] | None,
    ) -> Generator[Tensor, None, None]:
        """Yield the latents of a batch of videos after each step; see `sampler.trajectory`.

        Merges the LoRAs of the batch into the weights first. Raises UserError for an unknown LoRA.
        """
        self._use_lora(batch[0])
        return sampler.trajectory(
            self._model, batch, positives, negatives, mesh=self._mesh, device=self._device, options=self._options
        )

    def denoise(
        self,
        params: SamplingParams,
        positive: TextEmbedding,
        negative: TextEmbedding | None,
        on_step: OnStep,
        resume: StepState | None = None,
    ) -> np.ndarray:
        """Return the final latents: float32, shaped `params.latent_shape`; see `sampler.denoise`.

        If the latents are not finite, the group repeats its self-check: a failed check raises DeviceError, a passed
        check means that the sample is the cause, and NonFiniteError propagates. Raises UserError for an unknown LoRA.
        """
        self._use_lora(params)

        def report(done: int, result: FinishedStep) -> None:
            def read() -> StepState:
                history = {name: tensor.cpu().numpy() for name, tensor in result.state.items()}
                return StepState(done, result.latents.cpu().numpy(), history)

            on_step(done, read, *((result.computed,) if self._options.step_cache else ()))

        try:
            latents = sampler.denoise(
                self._model,
                params,
                positive,
                negative,
                mesh=self._mesh,
                device=self._device,
                on_step=report,
                options=self._options,
                resume=resume,
            )
        except NonFiniteError:
            check_group(self._model, self._mesh, self._device)
            raise
        return latents.cpu().numpy()

    def can_resume(self, params: SamplingParams, state: StepState) -> bool:
        """Return whether `state`, which may come from storage, has what a denoise with these parameters needs."""
        return sampler.resume_problem([params], sampler.as_batch(state), self._options) is None

    def _use_lora(self, params: SamplingParams) -> None:
        if self._loras:
            self._loras.use(params.lora)
        elif params.lora:
            raise UserError(f"lora = {params.lora!r}: the engine has no LoRAs. Name their files in its option loras.")
