"""A prompt in, frames out, in one process: the engine without a cluster.

    pipeline = HunyuanVideoPipeline.from_pretrained("ckpts", device="cuda")
    frames = pipeline("A cat walks on the grass, realistic.", height=544, width=960, seed=1)

The same three parts that the cluster runs in separate actors run here one after the other, so that equal parameters
give the frames that a group of one rank gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.protocol import DEFAULT_NEGATIVE_PROMPT, Device, RankPlace, SamplingParams, UserError, problems

if TYPE_CHECKING:
    from pathlib import Path


def _ignore(_step: int) -> None:
    pass


class HunyuanVideoPipeline:
    """All three parts of one engine, loaded on one device."""

    def __init__(self, engine: HunyuanVideo, device: Device) -> None:
        if found := engine.check():
            raise UserError("The model cannot be loaded: " + " | ".join(found))
        alone = RankPlace(
            rank=0, local_rank=0, ulysses_degree=1, ring_degree=1, device=device, address="", timeout_s=0.0
        )
        self._text_encoder = engine.text_encoder(device)
        self._denoiser = engine.join(alone)
        self._decoder = engine.decoder(device)

    @classmethod
    def from_pretrained(
        cls, model_base: str | Path, *, device: Device = "cuda", **options: Any
    ) -> HunyuanVideoPipeline:
        """Load from a checkpoint tree; `options` are those of `HunyuanVideo`. Raises UserError if it cannot be."""
        return cls(HunyuanVideo(model_base=model_base, **options), device)

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = DEFAULT_NEGATIVE_PROMPT,
        height: int = 720,
        width: int = 1280,
        num_frames: int = 129,
        num_inference_steps: int = 50,
        seed: int = 0,
        guidance_scale: float = 6.0,
        cfg_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        flow_shift: float = 7.0,
        on_step: Callable[[int], None] = _ignore,
    ) -> np.ndarray:
        """The frames of one video, uint8 [num_frames, height, width, 3]; an image is a video of one frame.

        `on_step(n)` is called after each denoising step. Raises UserError for values that cannot be rendered.
        """
        params = SamplingParams(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            seed=seed,
            guidance_scale=guidance_scale,
            cfg_scale=cfg_scale,
            guidance_rescale=guidance_rescale,
            flow_shift=flow_shift,
        )
        return np.concatenate(list(self.stream(params, on_step)))

    def stream(self, params: SamplingParams, on_step: Callable[[int], None] = _ignore) -> Iterator[np.ndarray]:
        """The same frames as chunks [n, height, width, 3], each as soon as it is decoded. Same errors."""
        _refuse_problems(asdict(params))
        texts = [params.prompt, params.negative_prompt] if params.uses_cfg else [params.prompt]
        positive, *rest = self._text_encoder.encode(texts, image=params.is_image)
        latents = self._denoiser.denoise(params, positive, rest[0] if rest else None, on_step)
        return self._decoder.decode(latents)


def _refuse_problems(values: Mapping[str, Any]) -> None:
    if found := problems(values):
        told = "; ".join(f"{problem.field} is {problem.value!r}, allowed is {problem.allowed}" for problem in found)
        raise UserError(f"This video cannot be rendered: {told}.")
