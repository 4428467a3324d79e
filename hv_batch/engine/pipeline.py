"""The single-process path from a prompt to frames: the engine without a cluster.

    pipeline = HunyuanVideoPipeline.from_pretrained("ckpts")
    frames = pipeline("A cat walks on the grass, realistic.", height=544, width=960, seed=1)

The pipeline runs the text encoders, the denoiser and the decoder one after the other; a cluster runs the same parts in
separate actors. Equal parameters therefore give the same frames as a denoise group with the same parallel plan. Each
part is loaded on first use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from hv_batch.engine.decoder import HunyuanDecoder
from hv_batch.engine.denoiser import HunyuanDenoiser
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.local_group import LocalGroup
from hv_batch.protocol import (
    DEFAULT_NEGATIVE_PROMPT,
    Device,
    ParallelPlan,
    RankSpec,
    SamplingParams,
    UserError,
    problems,
)

if TYPE_CHECKING:
    from pathlib import Path

    from hv_batch.engine.text_encoders import TextEmbedding, TextTowers

# Called with (finished steps, latents [videos, C, T, h, w] in float32). The callback must not modify the latents.
Callback = Callable[[int, Tensor], None]


class Interrupted(Exception):  # noqa: N818  # requested by the caller, not an error
    """`HunyuanVideoPipeline.interrupt` was called. The pipeline can be used again."""


class HunyuanVideoPipeline:
    """All parts of one engine on one device, or with the DiT divided over several processes.

    If `ulysses_degree` x `ring_degree` x `cfg_degree` is above 1, the pipeline starts that many processes (see
    `LocalGroup`). In this case, call `close` or use the pipeline as a context manager. `reproduce_seed` is passed to
    `make_deterministic` in each of these processes. Raises UserError if the model cannot be loaded or the degrees do
    not divide it.
    """

    def __init__(
        self,
        engine: HunyuanVideo,
        device: Device,
        *,
        ulysses_degree: int = 1,
        ring_degree: int = 1,
        cfg_degree: int = 1,
        reproduce_seed: int | None = None,
    ) -> None:
        for name, degree in (("ulysses_degree", ulysses_degree), ("ring_degree", ring_degree)):
            _require(name, degree, _is_count(degree), "a whole number above 0")
        _require("cfg_degree", cfg_degree, _is_count(cfg_degree) and cfg_degree <= 2, "1 or 2")
        plan = ParallelPlan(ulysses_degree=ulysses_degree, ring_degree=ring_degree, cfg_degree=cfg_degree)
        if load_problems := engine.check():
            raise UserError("The model cannot be loaded: " + " | ".join(load_problems))
        if plan_problems := engine.group_problems(plan):
            raise UserError("The model cannot run with this parallel plan: " + "; ".join(plan_problems) + ".")
        self.engine = engine
        self.device = device
        self._plan = plan
        self._reproduce_seed = reproduce_seed
        self._interrupted = threading.Event()

    @classmethod
    def from_pretrained(
        cls,
        model_base: str | Path,
        *,
        device: Device | Literal["auto"] = "auto",
        ulysses_degree: int = 1,
        ring_degree: int = 1,
        cfg_degree: int = 1,
        **options: Any,
    ) -> HunyuanVideoPipeline:
        """Build a pipeline from a checkpoint tree.

        `options` are those of `HunyuanVideo`. The device "auto" is cuda if available, otherwise cpu.
        """
        engine = HunyuanVideo(model_base=model_base, **options)
        return cls(
            engine,
            choose_device(device),
            ulysses_degree=ulysses_degree,
            ring_degree=ring_degree,
            cfg_degree=cfg_degree,
        )

    @cached_property
    def _text_encoder(self) -> TextTowers:
        return self.engine.text_encoder(self.device)

    @cached_property
    def _denoiser(self) -> HunyuanDenoiser | LocalGroup:
        if self._plan.world_size > 1:
            return LocalGroup(self.engine, self.device, self._plan, reproduce_seed=self._reproduce_seed)
        alone = RankSpec(rank=0, local_rank=0, plan=self._plan, device=self.device, address="", timeout_s=0.0)
        return self.engine.join(alone)

    @cached_property
    def _decoder(self) -> HunyuanDecoder:
        return self.engine.decoder(self.device)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = DEFAULT_NEGATIVE_PROMPT,
        height: int = 720,
        width: int = 1280,
        num_frames: int = 129,
        num_inference_steps: int = 50,
        seed: int | Sequence[int] = 0,
        num_videos: int = 1,
        batch_size: int = 1,
        guidance_scale: float = 6.0,
        cfg_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        flow_shift: float = 7.0,
        output: Literal["frames", "latents"] = "frames",
        callback: Callback | None = None,
    ) -> np.ndarray:
        """Render one or several videos. Returns uint8 frames [num_frames, height, width, 3]; one frame is an image.

        With several prompts, several seeds or `num_videos` above 1, the videos are stacked along a first axis, prompt
        by prompt; `plan_videos` documents their seeds. `batch_size` videos are denoised in one batch, which changes no
        bit of any video. `output="latents"` returns float32 latents [16, T, height / 8, width / 8] instead of frames.

        `callback(n, latents)` is called after each denoising step of each batch; its exceptions propagate. The callback
        or another thread may call `interrupt`. Raises UserError for invalid values, and Interrupted after `interrupt`.
        """
        videos = plan_videos(
            prompt,
            seed,
            num_videos,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            cfg_scale=cfg_scale,
            guidance_rescale=guidance_rescale,
            flow_shift=flow_shift,
        )
        _require("output", output, output in ("frames", "latents"), "'frames' or 'latents'")
        _require("batch_size", batch_size, _is_count(batch_size), "a whole number above 0")
        has_branches = self._plan.cfg_degree == 1 or cfg_scale > 1
        _require("cfg_scale", cfg_scale, has_branches, f"above 1 with cfg_degree {self._plan.cfg_degree}")
        self._interrupted.clear()
        results = [
            latents if output == "latents" else np.concatenate(list(self.decode(latents)))
            for latents in self.denoise(videos, batch_size=batch_size, callback=callback)
        ]
        is_one = isinstance(prompt, str) and isinstance(seed, int) and num_videos == 1
        return results[0] if is_one else np.stack(results)

    def stream(self, params: SamplingParams, on_step: Callable[[int], None] | None = None) -> Iterator[np.ndarray]:
        """Denoise one video, then yield its frames as uint8 chunks [n, height, width, 3] as they are decoded.

        `on_step(n)` is called after each denoising step. Raises the same errors as `__call__`.
        """
        callback = None if on_step is None else lambda step, _latents: on_step(step)
        self._interrupted.clear()
        (latents,) = self.denoise([params], callback=callback)
        return self.decode(latents)

    def encode(self, videos: Sequence[SamplingParams]) -> dict[str, TextEmbedding]:
        """Return the embedding of every prompt, and with CFG of every negative prompt, keyed by the text.

        The videos must be all images or all videos of several frames. Raises UserError for invalid values.
        """
        for params in videos:
            _require_valid(params.to_dict())
        texts = dict.fromkeys(params.prompt for params in videos)
        texts |= dict.fromkeys(params.negative_prompt for params in videos if params.uses_cfg)
        embeddings = self._text_encoder.encode(list(texts), image=videos[0].is_image)
        return dict(zip(texts, embeddings, strict=True))

    def denoise(
        self,
        videos: Sequence[SamplingParams],
        embeddings: Mapping[str, TextEmbedding] | None = None,
        *,
        batch_size: int = 1,
        callback: Callback | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the final float32 latents [16, T, h, w] of each video, in order.

        `embeddings` is the return value of `encode`, which is called if it is None. The videos may differ only in
        prompts and seed.
        """
        texts = self.encode(videos) if embeddings is None else embeddings
        for start in range(0, len(videos), batch_size):
            yield from self._denoise_batch(videos[start : start + batch_size], texts, callback)

    def _denoise_batch(
        self, batch: Sequence[SamplingParams], texts: Mapping[str, TextEmbedding], callback: Callback | None
    ) -> np.ndarray:
        positives = [texts[params.prompt] for params in batch]
        negatives = [texts[params.negative_prompt] for params in batch] if batch[0].uses_cfg else None
        steps = batch[0].num_inference_steps
        with closing(self._denoiser.trajectory(batch, positives, negatives)) as states:
            for step, latents in enumerate(states, 1):
                if callback is not None:
                    callback(step, latents)
                self._stop_if_interrupted(f"after step {step} of {steps}")
        return latents.cpu().numpy()

    def decode(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the frames of latents [16, T, h, w] as uint8 chunks [n, 8h, 8w, 3], in order."""
        for chunk in self._decoder.decode(latents):
            self._stop_if_interrupted("while decoding")
            yield chunk

    def interrupt(self) -> None:
        """Stop the call in progress: it raises Interrupted after the current step or chunk of frames.

        May be called from any thread and from a callback. It does not affect later calls.
        """
        self._interrupted.set()

    def _stop_if_interrupted(self, where: str) -> None:
        if self._interrupted.is_set():
            self._interrupted.clear()
            raise Interrupted(f"interrupted {where}")

    def free_text_encoder(self) -> None:
        """Free the memory of the text encoders, 16 GB for the released model. The next prompt loads them again."""
        self.__dict__.pop("_text_encoder", None)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Stop the processes of the group, if there is one."""
        denoiser = self.__dict__.pop("_denoiser", None)
        if isinstance(denoiser, LocalGroup):
            denoiser.close()

    def __enter__(self) -> HunyuanVideoPipeline:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def choose_device(device: Device | Literal["auto"]) -> Device:
    """Resolve "auto" to cuda if available, otherwise cpu. Raises UserError for an unknown name."""
    _require("device", device, device in ("auto", "cpu", "cuda"), "'auto', 'cpu' or 'cuda'")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def plan_videos(
    prompt: str | Sequence[str], seed: int | Sequence[int], num_videos: int, **values: Any
) -> list[SamplingParams]:
    """Return the parameters of `num_videos` videos of each prompt; `values` are the fields that all videos share.

    Video i of a prompt has seed `seed + i`. A list of seeds has one seed per prompt, which is the first seed of that
    prompt, or one seed per video. Raises UserError for invalid values; it names all invalid values of a video at once.
    """
    has_prompt = isinstance(prompt, str) or (isinstance(prompt, Sequence) and len(prompt) > 0)
    _require("prompt", prompt, has_prompt, "a text or a list of at least one text")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    _require("num_videos", num_videos, _is_count(num_videos), "a whole number above 0")
    total = len(prompts) * num_videos
    given = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed] * len(prompts)
    allowed = " or ".join(str(count) for count in sorted({len(prompts), total}))
    per_item = f"one per prompt or one per video (num_videos is {num_videos})"
    _require("seed", seed, len(given) in (len(prompts), total), f"one seed, or a list of {allowed}: {per_item}")
    for text in prompts:
        for first in given:
            _require_valid({**values, "prompt": text, "seed": first})
    videos_per_seed = num_videos if len(given) == len(prompts) else 1
    seeds = [first + i for first in given for i in range(videos_per_seed)]
    for video_seed in seeds:
        _require_valid({"seed": video_seed})
    texts = [text for text in prompts for _ in range(num_videos)]
    return [SamplingParams(prompt=text, seed=one, **values) for text, one in zip(texts, seeds, strict=True)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(field: str, value: Any, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise UserError(f"This video cannot be rendered: {field} is {value!r}, allowed is {allowed}.")


def _require_valid(values: Mapping[str, Any]) -> None:
    if invalid := problems(values):
        message = "; ".join(
            f"{problem.field} is {problem.value!r}, allowed is {problem.allowed}" for problem in invalid
        )
        raise UserError(f"This video cannot be rendered: {message}.")
    for field in ("prompt", "negative_prompt"):
        try:
            str(values.get(field, "")).encode()
        except UnicodeEncodeError as error:
            # A lone surrogate: Python decodes bytes of a command line to these if they are not in its encoding.
            raise UserError(f"This video cannot be rendered: {field} is not valid Unicode text ({error}).") from error
