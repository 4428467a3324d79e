"""How much of what it is told the toy model shows: `python -m hv_batch.toy.accuracy [MODEL_BASE]`.

Prompts come from combinations that it never saw in training; each video is read by the scorer and held against the
scene that its prompt was written from.
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
from hv_batch.toy.captions import told_scenes
from hv_batch.toy.checkpoint import cache_dir
from hv_batch.toy.scorer import Score, score
from hv_batch.toy.trained import write_trained_checkpoint
from hv_batch.toy.world import SIZES, Frames, Scene

PROMPTS_SEED = 2026


def rendered(
    pipeline: HunyuanVideoPipeline, count: int, *, num_frames: int = 33, **options: Any
) -> Iterator[tuple[Scene, str, Frames]]:
    """The first `count` held-out scenes, their prompts, and what the pipeline makes of these; seeds are 0, 1, ..."""
    for number, (scene, prompt) in enumerate(islice(told_scenes(PROMPTS_SEED, num_frames, held_out=True), count)):
        height, width = SIZES[number % len(SIZES)]  # in turns
        yield scene, prompt, pipeline(prompt, height=height, width=width, num_frames=num_frames, seed=number, **options)


def shares(scores: Iterable[Score]) -> dict[str, float]:
    """For each kind of attribute, and for "all" of them, the share that is right; left and right things count alike."""
    right: dict[str, list[bool]] = defaultdict(list)
    for one in scores:
        for name, is_right in one.right.items():
            right[name.removeprefix("left ").removeprefix("right ")].append(is_right)
            right["all"].append(is_right)
    return {name: sum(found) / len(found) for name, found in right.items()}


def main(
    model_base: Annotated[Path | None, typer.Argument(help="what a training has written; default: the shipped")] = None,
    prompts: int = 200,
    steps: int = 20,
    frames: int = 33,
    flow_shift: float = 7.0,
    cfg_scale: float = 3.0,
    step_cache: float = 0.0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Render held-out prompts, read the pictures, and print which share of the attributes is right, and the time."""
    precisions: Any = {"precision": "fp32", "vae_precision": "fp32", "text_encoder_precision": "fp32"}
    base = model_base or write_trained_checkpoint(cache_dir())
    with HunyuanVideoPipeline.from_pretrained(base, step_cache=step_cache, **precisions) as pipeline:
        scores, begun = [], time.perf_counter()
        for scene, prompt, video in rendered(
            pipeline, prompts, num_frames=frames, num_inference_steps=steps, flow_shift=flow_shift, cfg_scale=cfg_scale
        ):
            scores.append(score(scene, video))
            wrong = ", ".join(name for name, is_right in scores[-1].right.items() if not is_right)
            typer.echo(
                f"{len(scores)}/{prompts}  {prompt}  ->  {f'wrong: {wrong}' if wrong else 'all right'}", err=True
            )
        seconds = time.perf_counter() - begun
    found = shares(scores)
    if as_json:
        print(json.dumps(found))
        return
    for name, share in found.items():
        print(f"{name:>10}  {share:.1%}")
    print(f"{seconds / prompts:.1f} s a video")


if __name__ == "__main__":
    typer.run(main)
