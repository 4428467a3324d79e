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
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from hv_batch.engine.decoder import HunyuanDecoder
from hv_batch.engine.denoiser import HunyuanDenoiser
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.local_group import LocalGroup
from hv_batch.engine.rank_failures import exit_if_imported_by_a_rank
from hv_batch.engine.video_requests import check_batches, checked_videos, is_count, plain, plan_videos, require
from hv_batch.protocol import Device, ParallelPlan, RankSpec, UserError
from hv_batch.sampling_params import DEFAULT_NEGATIVE_PROMPT, SamplingParams

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

    A pipeline renders one call at a time. A call from a callback, or from another thread during a call, raises
    UserError; `decode` and `interrupt` may be called at any time. After an error, the pipeline can be used again: if
    the error has stopped the processes of a group, the next call starts them again.
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
        ulysses_degree, ring_degree, cfg_degree = plain(ulysses_degree), plain(ring_degree), plain(cfg_degree)
        for name, degree in (("ulysses_degree", ulysses_degree), ("ring_degree", ring_degree)):
            require(name, degree, is_count(degree), "a whole number above 0")
        require("cfg_degree", cfg_degree, is_count(cfg_degree) and cfg_degree <= 2, "1 or 2")
        plan = ParallelPlan(ulysses_degree=ulysses_degree, ring_degree=ring_degree, cfg_degree=cfg_degree)
        if plan.world_size > 1:
            exit_if_imported_by_a_rank()
        if load_problems := engine.check():
            raise UserError("The model cannot be loaded: " + " | ".join(load_problems))
        if plan_problems := engine.group_problems(plan):
            raise UserError("The model cannot run with this parallel plan: " + "; ".join(plan_problems) + ".")
        self.engine = engine
        self.device = device
        self._plan = plan
        self._reproduce_seed = reproduce_seed
        self._running = threading.Lock()  # held while a call computes
        self._interrupts = 0  # calls of `interrupt`; each call of the pipeline ends if the number changes

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

    def _ready_denoiser(self) -> HunyuanDenoiser | LocalGroup:
        """Return the denoiser; a group that an error has stopped is started again."""
        if isinstance(self._denoiser, LocalGroup) and self._denoiser.is_stopped:
            del self._denoiser
        return self._denoiser

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
        lora: str | Sequence[str] = "",
        output: Literal["frames", "latents"] = "frames",
        callback: Callback | None = None,
    ) -> Any:
        """Render one or several videos. Returns uint8 frames [num_frames, height, width, 3]; one frame is an image.

        With several prompts, several seeds or `num_videos` above 1, the videos are stacked along a first axis, prompt
        by prompt; `plan_videos` documents their seeds. An empty list of prompts returns an empty list. `batch_size`
        videos are denoised in one batch, which changes no bit of any video. `output="latents"` returns float32 latents
        [16, T, height / 8, width / 8] instead of frames. `lora` names entries of the engine option `loras`, with
        optional strengths, as "film:0.7,grain"; the next call without it renders without LoRA.

        `callback(n, latents)` is called after each denoising step of each batch; its exceptions propagate. The callback
        or another thread may call `interrupt`. Raises UserError for invalid values, NonFiniteError for embeddings,
        latents or frames that are not finite, Interrupted after `interrupt`, and the error of a rank of a group.
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
            lora=lora,
        )
        require("output", output, output in ("frames", "latents"), "'frames' or 'latents'")
        videos = checked_videos(videos, self._plan.cfg_degree)
        batch_size, mark = check_batches(videos, batch_size), self._interrupts
        with self._one_call():
            results = [
                latents if output == "latents" else np.concatenate(list(self._decode(latents, mark)))
                for latents in self._denoise(videos, self._encode(videos), batch_size, callback, mark)
            ]
        is_one = isinstance(prompt, str) and isinstance(plain(seed), int) and plain(num_videos) == 1
        return results[0] if is_one else np.stack(results) if results else results

    def stream(self, params: SamplingParams, on_step: Callable[[int], None] | None = None) -> Iterator[np.ndarray]:
        """Denoise one video, then yield its frames as uint8 chunks [n, height, width, 3] as they are decoded.

        `on_step(n)` is called after each denoising step. Raises the same errors as `__call__`.
        """
        videos, mark = checked_videos([params], self._plan.cfg_degree), self._interrupts
        callback = None if on_step is None else lambda step, _latents: on_step(step)
        with self._one_call():
            (latents,) = self._denoise(videos, self._encode(videos), 1, callback, mark)
        return self._decode(latents, mark)

    def encode(self, videos: Sequence[SamplingParams]) -> dict[str, TextEmbedding]:
        """Return the embedding of every prompt, and with CFG of every negative prompt, keyed by the text.

        The videos must be all images or all videos of several frames. Raises UserError for invalid values, and
        NonFiniteError if an embedding is not finite.
        """
        videos = checked_videos(videos, self._plan.cfg_degree)
        with self._one_call():
            return self._encode(videos)

    def denoise(
        self,
        videos: Sequence[SamplingParams],
        embeddings: Mapping[str, TextEmbedding] | None = None,
        *,
        batch_size: int = 1,
        callback: Callback | None = None,
    ) -> Iterator[np.ndarray]:
        """Return an iterator over the final float32 latents [16, T, h, w] of each video, in order.

        `embeddings` is the return value of `encode`, which is called if it is None. The videos of a batch may differ
        only in prompts and seed. Raises the same errors as `__call__`, those of invalid values before the first video.
        """
        videos = checked_videos(videos, self._plan.cfg_degree)
        batch_size, mark = check_batches(videos, batch_size), self._interrupts
        texts = self.encode(videos) if embeddings is None else embeddings
        if lacking := [text for text in _texts(videos) if text not in texts]:
            raise UserError(f"`embeddings` lacks the text {lacking[0]!r}. Pass the result of encode() of these videos.")
        return self._denoise(videos, texts, batch_size, callback, mark, self._one_call)

    def _encode(self, videos: Sequence[SamplingParams]) -> dict[str, TextEmbedding]:
        if not (texts := _texts(videos)):
            return {}
        embeddings = self._text_encoder.encode(texts, image=videos[0].is_image)
        return dict(zip(texts, embeddings, strict=True))

    def _denoise(
        self,
        videos: Sequence[SamplingParams],
        texts: Mapping[str, TextEmbedding],
        batch_size: int,
        callback: Callback | None,
        mark: int,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[np.ndarray]:
        """Yield the latents of each video. `guard` is entered while a batch is denoised, not between two batches."""
        for start in range(0, len(videos), batch_size):
            with guard():
                finals = self._denoise_batch(videos[start : start + batch_size], texts, callback, mark)
            yield from finals

    def _denoise_batch(
        self,
        batch: Sequence[SamplingParams],
        texts: Mapping[str, TextEmbedding],
        callback: Callback | None,
        mark: int,
    ) -> np.ndarray:
        positives = [texts[params.prompt] for params in batch]
        negatives = [texts[params.negative_prompt] for params in batch] if batch[0].uses_cfg else None
        steps = batch[0].num_inference_steps
        with closing(self._ready_denoiser().trajectory(batch, positives, negatives)) as states:
            for step, latents in enumerate(states, 1):
                if callback is not None:
                    callback(step, latents)
                self._stop_if_interrupted(mark, f"after step {step} of {steps}")
        return latents.cpu().numpy()

    def decode(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Return an iterator over the frames of latents [16, T, h, w] as uint8 chunks [n, 8h, 8w, 3], in order."""
        return self._decode(latents, self._interrupts)

    def _decode(self, latents: np.ndarray, mark: int) -> Iterator[np.ndarray]:
        for chunk in self._decoder.decode(latents):
            self._stop_if_interrupted(mark, "while decoding")
            yield chunk

    @contextmanager
    def _one_call(self) -> Iterator[None]:
        """Raise UserError if another call is running: the ranks of a group would answer the wrong one, or neither."""
        if not self._running.acquire(blocking=False):
            raise UserError(
                "This pipeline is already rendering, and it renders one call at a time. Call it again when that call "
                "has returned: not from its callback, and from other threads only with a lock; or use a pipeline for "
                "each thread."
            )
        try:
            yield
        finally:
            self._running.release()

    def interrupt(self) -> None:
        """Stop the calls in progress: they raise Interrupted after the current step or chunk of frames.

        May be called from any thread and from a callback. It does not affect calls that begin later.
        """
        self._interrupts += 1

    def _stop_if_interrupted(self, mark: int, where: str) -> None:
        """Raise Interrupted if `interrupt` was called since the number of its calls was `mark`."""
        if self._interrupts != mark:
            raise Interrupted(f"interrupted {where}")

    def identity(self) -> dict[str, Any]:
        """Return the identity of the engine, with the values that the ranks have chosen for its open options.

        Loads the model if an option is open (`attention: auto`).
        """
        choices = self._ready_denoiser().choices() if self.engine.open_options() else {}
        return {**self.engine.identity(), **choices}

    def free_text_encoder(self) -> None:
        """Free the memory of the text encoders, 16 GB for the released model. The next prompt loads them again."""
        self.__dict__.pop("_text_encoder", None)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Stop the processes of the group, if there is one. Raises UserError during a call of another thread."""
        with self._one_call():
            denoiser = self.__dict__.pop("_denoiser", None)
            if isinstance(denoiser, LocalGroup):
                denoiser.close()

    def __enter__(self) -> HunyuanVideoPipeline:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def choose_device(device: Device | Literal["auto"]) -> Device:
    """Resolve "auto" to cuda if available, otherwise cpu. Raises UserError for an unknown name."""
    require("device", device, device in ("auto", "cpu", "cuda"), "'auto', 'cpu' or 'cuda'")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _texts(videos: Sequence[SamplingParams]) -> list[str]:
    """Return every prompt, and with CFG every negative prompt, once."""
    texts = dict.fromkeys(params.prompt for params in videos)
    texts |= dict.fromkeys(params.negative_prompt for params in videos if params.uses_cfg)
    return list(texts)
