"""Measures what computed steps are worth on the toy: `python -m hv_batch.bench.step_quality [--write]`.

The toy forgives more than the released model: 12 plain Euler steps of it are within 39 dB of 50. So a setting is judged
by its gain over plain Euler steps with as many runs of the model, against the result of 50 steps and against that of
200, which is closer to the exact solution. `--write` replaces the table in README.md of this folder.

The first-block cache, the step cache of hv_batch 0.2.0, was measured with the same videos before it was removed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn import functional

from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.workload import Workload
from hv_batch.sampling_params import DEFAULT_NEGATIVE_PROMPT
from hv_batch.step_schedule import KIND
from hv_batch.toy.accuracy import PROMPTS_SEED
from hv_batch.toy.captions import captioned_scenes
from hv_batch.toy.checkpoint import cache_dir
from hv_batch.toy.scorer import score
from hv_batch.toy.trained import write_trained_checkpoint
from hv_batch.toy.world import Frames, Scene

STEPS, FINE = 50, 200
SHAPE = (128, 128, 17)
VIDEO: Mapping[str, Any] = dict(zip(("height", "width", "num_frames"), SHAPE, strict=True))
REST: Mapping[str, Any] = {
    "negative_prompt": DEFAULT_NEGATIVE_PROMPT,
    "guidance_rescale": 0.0,
    "flow_shift": 7.0,
    "guidance_scale": 6.0,
    "cfg_scale": 3.0,
}
FP32: Mapping[str, Any] = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
README = Path(__file__).with_name("README.md")
OLD_CURVE = Path(__file__).with_name("first_block_cache.json")
BEGIN, END = "<!-- step_quality: begin -->", "<!-- step_quality: end -->"

# Computed steps of 50 that were published for the released model: Jenga's, and MagCache's with E 0.12, K 4 and with
# E 0.24, K 6.
JENGA = [0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 26, 29, 32, 35, 38, 41, 43, 45, 46, 47, 49]
MAGCACHE_22 = [*range(10), 12, 15, 18, 22, 25, 29, 33, 38, 43, 46, 48, 49]
MAGCACHE_19 = [*range(10), 14, 18, 23, 29, 34, 41, 46, 48, 49]

REUSE: Mapping[str, Any] = {"order": 0, "correct": False}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "`computed: 23`": {"step_cache": {"computed": 23}},
    "`computed: 16`": {"step_cache": {"computed": 16}},
    "`computed: 12`": {"step_cache": {"computed": 12}},
    "`computed: 16, taper: 0`": {"step_cache": {"computed": 16, "taper": 0}},
    "`computed: 23, warmup: 5`": {"step_cache": {"computed": 23, "warmup": 5}},
    "`computed: 16, warmup: 5`": {"step_cache": {"computed": 16, "warmup": 5}},
    "Jenga's list": {"step_cache": {"computed": JENGA}},
    "MagCache's list of 22": {"step_cache": {"computed": MAGCACHE_22}},
    "MagCache's list of 19": {"step_cache": {"computed": MAGCACHE_19}},
    "`computed: 16, correct: false`": {"step_cache": {"computed": 16, "correct": False}},
    "`computed: 16, order: 0, correct: false`": {"step_cache": {"computed": 16, **REUSE}},
    "MagCache's list of 22, `order: 0, correct: false`": {"step_cache": {"computed": MAGCACHE_22, **REUSE}},
    "`cfg_until: 0.5`": {"cfg_until": 0.5},
    "`computed: 16`, `cfg_until: 0.5`": {"step_cache": {"computed": 16}, "cfg_until": 0.5},
}


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of some videos, on average."""

    evaluations: float  # of both guidance branches; a step that runs one of them counts as a half
    psnr: float  # dB, against 50 steps
    fine_psnr: float  # dB, against 200 steps
    ssim: float  # against 50 steps
    attributes: float  # share of the attributes of the prompt that the scorer reads from the frames


class Toy:
    """The trained toy, and the results of 50 and of 200 steps with which others are compared."""

    def __init__(self, count: int) -> None:
        self._base = write_trained_checkpoint(cache_dir())
        self._scenes = list(islice(captioned_scenes(PROMPTS_SEED, VIDEO["num_frames"], held_out=True), count))
        self._coarse = list(self._render(STEPS, {}))
        self._fine = list(self._render(FINE, {}))

    def quality(self, steps: int, options: Mapping[str, Any]) -> Quality:
        """Render all videos in so many steps, with these engine options."""
        frames = list(self._render(steps, options))
        model = ModelShape.from_options(options)
        right = [value for (scene, _), one in zip(self._scenes, frames, strict=True) for value in _right(scene, one)]
        return Quality(
            evaluations=model.forwards(Workload(SHAPE, steps, branches=2)).total() / 2,
            psnr=_mean(psnr, frames, self._coarse),
            fine_psnr=_mean(psnr, frames, self._fine),
            ssim=_mean(ssim, frames, self._coarse),
            attributes=sum(right) / len(right),
        )

    def _render(self, steps: int, options: Mapping[str, Any]) -> Iterator[Frames]:
        with HunyuanVideoPipeline.from_pretrained(self._base, device="cpu", **FP32, **options) as pipeline:
            for seed, (_, prompt) in enumerate(self._scenes):
                yield pipeline(prompt, seed=seed, num_inference_steps=steps, **VIDEO, **REST)


def _right(scene: Scene, frames: Frames) -> Sequence[bool]:
    return list(score(scene, frames).right.values())


def _mean(measure: Any, frames: Sequence[Frames], references: Sequence[Frames]) -> float:
    return float(np.mean([measure(one, other) for one, other in zip(frames, references, strict=True)]))


def psnr(frames: Frames, reference: Frames) -> float:
    """Return the peak signal-to-noise ratio of uint8 frames in dB; at most 99."""
    error = np.square(frames.astype(np.float64) - reference).mean()
    return float(min(99.0, 10 * np.log10(255**2 / max(error, 1e-9))))


def ssim(frames: Frames, reference: Frames) -> float:
    """Return the mean structural similarity of uint8 frames [F, H, W, 3] (Wang et al., 2004).

    A Gaussian window of 11 x 11 pixels with a standard deviation of 1.5, on each channel.
    """
    one, other = (
        torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2).flatten(0, 1)[:, None] for x in (frames, reference)
    )
    bell = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2

    def blur(x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, window)

    mean, mean_other = blur(one), blur(other)
    variance, variance_other = blur(one**2) - mean**2, blur(other**2) - mean_other**2
    covariance = blur(one * other) - mean * mean_other
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean * mean_other + c1) * (2 * covariance + c2)
    return float((similarity / ((mean**2 + mean_other**2 + c1) * (variance + variance_other + c2))).mean())


def measure(count: int, report: Any) -> Iterator[tuple[str, Quality, Quality]]:
    """Yield each setting with its quality, and that of plain Euler steps with as many evaluations, rounded up."""
    toy, plain = Toy(count), dict[int, Quality]()

    def euler(evaluations: float) -> Quality:
        steps = int(np.ceil(evaluations))
        if steps not in plain:
            plain[steps] = toy.quality(steps, {})
            report(f"{steps} Euler steps: {plain[steps]}")
        return plain[steps]

    for name, options in SETTINGS.items():
        cache = {"step_cache": {"kind": KIND, **options["step_cache"]}} if "step_cache" in options else {}
        quality = toy.quality(STEPS, {**options, **cache})
        report(f"{name}: {quality}")
        yield name, quality, euler(quality.evaluations)
    for old in json.loads(OLD_CURVE.read_text("utf-8")):
        yield old.pop("setting"), (quality := Quality(**old)), euler(quality.evaluations)


def table(rows: Iterator[tuple[str, Quality, Quality]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| setting | evaluations of 50 | PSNR to 50 steps | gain | PSNR to 200 steps | gain | SSIM | attributes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one, plain in rows:
        gains = one.psnr - plain.psnr, one.fine_psnr - plain.fine_psnr
        lines.append(
            f"| {name} | {one.evaluations:g} | {one.psnr:.1f} dB | {gains[0]:+.1f} dB | {one.fine_psnr:.1f} dB | "
            f"{gains[1]:+.1f} dB | {one.ssim:.4f} | {one.attributes:.0%} |"
        )
    return "\n".join(lines)


def main(
    prompts: Annotated[int, typer.Option(min=1, help="held-out prompts of the toy")] = 3,
    write: Annotated[bool, typer.Option("--write", help="replace the table in bench/README.md")] = False,
) -> None:
    """Render the toy's prompts with every setting, and print the table. Takes about half an hour on one core."""
    torch.set_num_threads(1)
    text = table(measure(prompts, lambda line: typer.echo(line, err=True)))
    print(text)
    if write:
        before, _, rest = README.read_text("utf-8").partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    typer.run(main)
