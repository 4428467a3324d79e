"""Measure how much of its prompts the toy model renders: `python -m hv_batch.toy.accuracy [MODEL_BASE]`.

The prompts describe combinations of shape, colour and background that were held out of training. The scorer reads the
attributes of each video from its pixels and compares them with the scene that the prompt describes.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.step_schedule import KIND
from hv_batch.toy.captions import captioned_scenes
from hv_batch.toy.checkpoint import cache_dir
from hv_batch.toy.scorer import Score, score
from hv_batch.toy.trained import write_trained_checkpoint
from hv_batch.toy.world import SIZES, Frames, Scene

PROMPTS_SEED = 2026


def render_held_out(
    pipeline: HunyuanVideoPipeline, count: int, *, num_frames: int = 33, **options: Any
) -> Iterator[tuple[Scene, str, Frames]]:
    """Render the first `count` held-out scenes, with the seeds 0, 1, ... and the sizes of the world in rotation.

    Yields each scene, its prompt and its uint8 frames [F, H, W, 3].
    """
    for number, (scene, prompt) in enumerate(islice(captioned_scenes(PROMPTS_SEED, num_frames, held_out=True), count)):
        height, width = SIZES[number % len(SIZES)]
        yield scene, prompt, pipeline(prompt, height=height, width=width, num_frames=num_frames, seed=number, **options)


def accuracy_by_attribute(scores: Iterable[Score]) -> dict[str, float]:
    """Return the fraction of correct values of each attribute, and of "all" attributes.

    The attributes of the left and of the right thing of a scene are counted together.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for one in scores:
        for name, is_right in one.right.items():
            right[name.removeprefix("left ").removeprefix("right ")].append(is_right)
            right["all"].append(is_right)
    return {name: sum(values) / len(values) for name, values in right.items()}


def main(
    model_base: Annotated[Path | None, typer.Argument(help="folder of a checkpoint; default: the shipped toy")] = None,
    prompts: int = 200,
    steps: int = 20,
    frames: int = 33,
    flow_shift: float = 7.0,
    cfg_scale: float = 3.0,
    step_cache: Annotated[int, typer.Option(help="steps of 50 that run the model; 0: all")] = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Render held-out prompts, and print the fraction of correct values of each attribute and the time per video."""
    precisions: Any = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
    base = model_base or write_trained_checkpoint(cache_dir())
    cache = {"kind": KIND, "computed": step_cache} if step_cache else None
    with HunyuanVideoPipeline.from_pretrained(base, step_cache=cache, **precisions) as pipeline:
        scores, begun = [], time.perf_counter()
        for scene, prompt, video in render_held_out(
            pipeline, prompts, num_frames=frames, num_inference_steps=steps, flow_shift=flow_shift, cfg_scale=cfg_scale
        ):
            scores.append(score(scene, video))
            wrong = ", ".join(name for name, is_right in scores[-1].right.items() if not is_right)
            typer.echo(
                f"{len(scores)}/{prompts}  {prompt}  ->  {f'wrong: {wrong}' if wrong else 'all correct'}", err=True
            )
        seconds = time.perf_counter() - begun
    accuracy = accuracy_by_attribute(scores)
    if as_json:
        print(json.dumps(accuracy))
        return
    for name, fraction in accuracy.items():
        print(f"{name:>10}  {fraction:.1%}")
    print(f"{seconds / prompts:.1f} s per video")


if __name__ == "__main__":
    typer.run(main)
