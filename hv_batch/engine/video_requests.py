"""Validate what a caller asks of the pipeline, and assign the seeds of several videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hv_batch.protocol import UserError
from hv_batch.sampling_params import SamplingParams, canonical_lora, problems


def plan_videos(
    prompt: str | Sequence[str], seed: int | Sequence[int], num_videos: int, **values: Any
) -> list[SamplingParams]:
    """Return the parameters of `num_videos` videos of each prompt; `values` are the fields that all videos share.

    Video i of a prompt has seed `seed + i`. A list of seeds has one seed per prompt, which is the first seed of that
    prompt, or one seed per video. No prompts give no videos. Numbers and arrays of numpy are accepted. Raises UserError
    for invalid values; it names all invalid values of a video at once.
    """
    prompt, seed, num_videos = plain(prompt), plain(seed), plain(num_videos)
    values = {name: canonical_lora(value) if name == "lora" else plain(value) for name, value in values.items()}
    require("prompt", prompt, isinstance(prompt, Sequence), "a text or a list of texts")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    require("num_videos", num_videos, is_count(num_videos), "a whole number above 0")
    total = len(prompts) * num_videos
    given = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed] * len(prompts)
    given = [plain(one) for one in given]
    allowed = " or ".join(str(count) for count in sorted({len(prompts), total}))
    per_item = f"one per prompt or one per video (num_videos is {num_videos})"
    require("seed", seed, len(given) in (len(prompts), total), f"one seed, or a list of {allowed}: {per_item}")
    if not prompts:
        _require_valid(values)
    for text, first in zip(prompts, given, strict=False):  # the other seeds are checked below
        _require_valid({**values, "prompt": text, "seed": first})
    videos_per_seed = num_videos if len(given) == len(prompts) else 1
    seeds = [first + i for first in given for i in range(videos_per_seed)]
    for video_seed in seeds:
        _require_valid({"seed": video_seed})
    texts = [text for text in prompts for _ in range(num_videos)]
    return [SamplingParams(prompt=text, seed=one, **values) for text, one in zip(texts, seeds, strict=True)]


def checked_videos(videos: Sequence[SamplingParams], cfg_degree: int) -> list[SamplingParams]:
    """Return the videos with plain numbers. Raises UserError unless a pipeline can render them one after the other.

    `cfg_degree` is that of its parallel plan.
    """
    plain_videos = [
        replace(params, **{name: plain(value) for name, value in params.to_dict().items()}) for params in videos
    ]
    for params in plain_videos:
        _require_valid(params.to_dict())
        has_branches = cfg_degree == 1 or params.uses_cfg
        require("cfg_scale", params.cfg_scale, has_branches, f"above 1 with cfg_degree {cfg_degree}")
    if len({params.is_image for params in plain_videos}) > 1:
        raise UserError(
            "These videos cannot be rendered in one call: some are images (num_frames 1) and some are not, and the "
            "prompt of an image is encoded differently. Render them in two calls."
        )
    return plain_videos


def check_batches(videos: Sequence[SamplingParams], batch_size: int) -> int:
    """Return the batch size as a plain number.

    Raises UserError if it is not allowed, or if the videos of a batch differ in anything but prompts and seed.
    """
    batch_size = plain(batch_size)
    require("batch_size", batch_size, is_count(batch_size), "a whole number above 0")
    for start in range(0, len(videos), batch_size):
        batch = [replace(one, prompt="", negative_prompt="", seed=0) for one in videos[start : start + batch_size]]
        if any(one != batch[0] for one in batch):
            raise UserError(
                f"The videos {start} to {start + len(batch) - 1} cannot be denoised in one batch: videos of one batch "
                "may differ in prompts and seed only. Choose batch_size 1."
            )
    return batch_size


def plain(value: Any) -> Any:
    """Convert a number or an array of numpy to Python's."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def require(field: str, value: Any, is_allowed: bool, allowed: str) -> None:
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
