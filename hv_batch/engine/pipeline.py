"""A prompt in, frames out: the engine without a cluster.

    pipeline = HunyuanVideoPipeline.from_pretrained("ckpts")
    frames = pipeline("A cat walks on the grass, realistic.", height=544, width=960, seed=1)

The same three parts that the cluster runs in separate actors run here one after the other, so that equal parameters
give the frames that a denoise group of as many ranks gives. Each part is loaded when it is first needed.
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

# (steps done, latents [videos, C, T, h, w] in float32); the latents are to be looked at, not changed.
Callback = Callable[[int, Tensor], None]


class Interrupted(Exception):  # noqa: N818  # a wish that was fulfilled, no error
    """`HunyuanVideoPipeline.interrupt` was called; the pipeline can be used again."""


class HunyuanVideoPipeline:
    """All parts of one engine on one device, or with its DiT shared out over several processes.

    With `ulysses_degree` x `ring_degree` x `cfg_degree` above 1, the pipeline starts as many processes (see
    `LocalGroup`); close it, or use it as a context manager. Raises UserError when the model cannot be loaded.
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
            _refuse_choice(name, degree, _is_count(degree), "a whole number above 0")
        _refuse_choice("cfg_degree", cfg_degree, _is_count(cfg_degree) and cfg_degree <= 2, "1 or 2")
        plan = ParallelPlan(ulysses_degree=ulysses_degree, ring_degree=ring_degree, cfg_degree=cfg_degree)
        if found := engine.check():
            raise UserError("The model cannot be loaded: " + " | ".join(found))
        if found := engine.group_problems(plan):
            raise UserError("The model cannot be shared out like this: " + "; ".join(found) + ".")
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
        """From a checkpoint tree; `options` are those of `HunyuanVideo`. "auto" is cuda where it is, else cpu."""
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
        """The frames of one video, uint8 [num_frames, height, width, 3]; an image is a video of one frame.

        With several prompts, several seeds or `num_videos` above 1, the videos are stacked along a first axis, prompt
        by prompt; `plan_videos` says which seed each has. `batch_size` of them are denoised side by side, which changes
        no bit of any. `output="latents"` gives float32 latents [16, T, height / 8, width / 8] instead of frames.

        `callback(n, latents)` is called after each denoising step of each batch; what it raises passes through. It, or
        another thread, may call `interrupt`. Raises UserError for values that cannot be rendered, and Interrupted.
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
        _refuse_choice("output", output, output in ("frames", "latents"), "'frames' or 'latents'")
        _refuse_choice("batch_size", batch_size, _is_count(batch_size), "a whole number above 0")
        both = self._plan.cfg_degree == 1 or cfg_scale > 1
        _refuse_choice("cfg_scale", cfg_scale, both, f"above 1 with cfg_degree {self._plan.cfg_degree}")
        self._interrupted.clear()
        done = [
            latents if output == "latents" else np.concatenate(list(self.decode(latents)))
            for latents in self.denoise(videos, batch_size=batch_size, callback=callback)
        ]
        is_one = isinstance(prompt, str) and isinstance(seed, int) and num_videos == 1
        return done[0] if is_one else np.stack(done)

    def stream(self, params: SamplingParams, on_step: Callable[[int], None] | None = None) -> Iterator[np.ndarray]:
        """The frames of one video as chunks [n, height, width, 3], each as soon as it is decoded. Same errors."""
        callback = None if on_step is None else lambda step, _latents: on_step(step)
        self._interrupted.clear()
        (latents,) = self.denoise([params], callback=callback)
        return self.decode(latents)

    def encode(self, videos: Sequence[SamplingParams]) -> dict[str, TextEmbedding]:
        """The embedding of every prompt, and where CFG is used negative prompt, of videos that are alike in kind.

        Raises UserError for values that cannot be rendered.
        """
        for params in videos:
            _refuse_problems(params.to_dict())
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
        """Final latents [16, T, h, w] of each video in turn; `embeddings` are those of `encode`, made if not given.

        The videos may differ in prompts and seed only.
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
        """Frames of latents [16, T, h, w] as uint8 chunks [n, 8h, 8w, 3], in order."""
        for chunk in self._decoder.decode(latents):
            self._stop_if_interrupted("while decoding")
            yield chunk

    def interrupt(self) -> None:
        """End the call in progress: it raises Interrupted after the step, or the chunk of frames, that it is at.

        May be called from any thread and from a callback. The next call of the pipeline knows nothing of it.
        """
        self._interrupted.set()

    def _stop_if_interrupted(self, where: str) -> None:
        if self._interrupted.is_set():
            self._interrupted.clear()
            raise Interrupted(f"interrupted {where}")

    def free_text_encoder(self) -> None:
        """Give the towers' memory back, 16 GB for the released model; the next prompt loads them again."""
        self.__dict__.pop("_text_encoder", None)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End the processes of a group, if there are any."""
        denoiser = self.__dict__.pop("_denoiser", None)
        if isinstance(denoiser, LocalGroup):
            denoiser.close()

    def __enter__(self) -> HunyuanVideoPipeline:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def choose_device(device: Device | Literal["auto"]) -> Device:
    _refuse_choice("device", device, device in ("auto", "cpu", "cuda"), "'auto', 'cpu' or 'cuda'")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def plan_videos(
    prompt: str | Sequence[str], seed: int | Sequence[int], num_videos: int, **values: Any
) -> list[SamplingParams]:
    """The parameters of `num_videos` videos of each prompt; `values` are the fields that all of them share.

    Video i of every prompt has `seed + i`. Several seeds are one for each prompt, to count up from, or one for each
    video. Raises UserError for values that cannot be rendered, all of a video's at once.
    """
    is_some = isinstance(prompt, str) or (isinstance(prompt, Sequence) and len(prompt) > 0)
    _refuse_choice("prompt", prompt, is_some, "a text, or at least one in a list")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    _refuse_choice("num_videos", num_videos, _is_count(num_videos), "a whole number above 0")
    total = len(prompts) * num_videos
    given = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed] * len(prompts)
    allowed = " or ".join(str(count) for count in sorted({len(prompts), total}))
    each_of = f"one for each prompt or for each video (num_videos is {num_videos})"
    _refuse_choice("seed", seed, len(given) in (len(prompts), total), f"one seed, or a list of {allowed}: {each_of}")
    for text in prompts:
        for one in given:
            _refuse_problems({**values, "prompt": text, "seed": one})
    each = num_videos if len(given) == len(prompts) else 1
    seeds = [first + i for first in given for i in range(each)]
    for last in seeds:
        _refuse_problems({"seed": last})
    every = [text for text in prompts for _ in range(num_videos)]
    return [SamplingParams(prompt=text, seed=one, **values) for text, one in zip(every, seeds, strict=True)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refuse_choice(field: str, value: Any, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise UserError(f"This video cannot be rendered: {field} is {value!r}, allowed is {allowed}.")


def _refuse_problems(values: Mapping[str, Any]) -> None:
    if found := problems(values):
        told = "; ".join(f"{problem.field} is {problem.value!r}, allowed is {problem.allowed}" for problem in found)
        raise UserError(f"This video cannot be rendered: {told}.")
    for field in ("prompt", "negative_prompt"):
        try:
            str(values.get(field, "")).encode()
        except UnicodeEncodeError as error:
            # A lone surrogate: what Python makes of bytes on a command line that are not in the terminal's encoding.
            raise UserError(f"This video cannot be rendered: {field} is not valid Unicode text ({error}).") from error
