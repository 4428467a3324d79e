"""Measures sparse and 8-bit attention: `python -m hv_batch.bench.attention_methods speed|mass|quality`.

`speed` alternates the sparse kernel with SDPA in one process, so the ratio does not depend on other load. `mass` and
`quality` use the toy with blocks of 16 tokens: a toy video has 20 or 36 of them, where 720p has 929. This is a harder
case, because a block is a larger part of the video.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from hv_batch.architecture import DiTConfig
from hv_batch.attention_methods import AttentionMethods, SparseAttention, parse_sparse_attention
from hv_batch.bench.step_quality import FP32, REST, VIDEO, psnr
from hv_batch.engine.attention.block_selection import choose_blocks, estimate_probabilities, select_blocks
from hv_batch.engine.attention.block_sparse import SparseKernel
from hv_batch.engine.attention.kernels import Kernel, attend_sdpa
from hv_batch.engine.attention.token_order import BlockLayout, block_layout
from hv_batch.engine.checkpoint.loading import load_dit
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.option_values import parse_fields
from hv_batch.engine.parallel.sequence import SequenceMesh, attend_jointly
from hv_batch.engine.pipeline import HunyuanVideoPipeline
from hv_batch.engine.sampling.sampler import SamplingOptions, trajectory
from hv_batch.engine.video_requests import plan_videos
from hv_batch.step_schedule import computed_steps, parse_step_cache
from hv_batch.toy.accuracy import PROMPTS_SEED
from hv_batch.toy.captions import captioned_scenes
from hv_batch.toy.checkpoint import cache_dir
from hv_batch.toy.scorer import score
from hv_batch.toy.trained import write_trained_checkpoint
from hv_batch.toy.world import Frames, Scene

GRID, TEXT, HEADS, HEAD_DIM = (4, 32, 32), 64, 2, 128  # of the speed measurement: 4,096 image tokens
DENSITIES = (0.5, 0.3, 0.15)
TOY_BRICK = (4, 2, 2)
FINE_BRICK = (1, 2, 2)  # 80 blocks in the videos of `quality`
TOY_BLOCKS: Mapping[str, Any] = {"brick": list(TOY_BRICK), "neighbours": "faces", "backend": "eager"}
LONG: Mapping[str, Any] = {**VIDEO, "num_frames": 33}  # more blocks than the short videos of `step_quality`
CPU = torch.device("cpu")
app = typer.Typer(help=__doc__)


@app.command()
def speed(rounds: int = 9, threads: int = 1) -> None:
    """Time the compiled kernel and the block selection relative to SDPA, at 4,096 tokens on this device."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, TEXT + 4096, HEADS, HEAD_DIM, generator=draw).to(device, dtype)
    print("density  kept  sparse/SDPA  selection/SDPA")
    for density in DENSITIES:
        options = SparseAttention(density=density, neighbours="none")
        layout = block_layout(GRID, options.brick, options.neighbours, device)
        kernel = SparseKernel(options, layout, TEXT, attend_sdpa)
        kept = select_blocks(q[TEXT:], k[TEXT:], layout, options).float().mean()
        calls = (
            lambda: attend_sdpa(q, k, v),
            lambda kernel=kernel: kernel(q, k, v),
            lambda layout=layout, options=options: select_blocks(q[TEXT:], k[TEXT:], layout, options),
        )
        dense, sparse, selection = _alternate(calls, rounds)
        print(f"{density:7.2f}  {kept:.2f}  {sparse / dense:11.2f}  {selection / dense:14.3f}")


def _alternate(calls: tuple[Callable[[], Any], ...], rounds: int) -> list[float]:
    """Return the median seconds of each call, in alternation. On a CPU, these are CPU seconds of this process."""
    is_cuda, clock = torch.cuda.is_available(), time.perf_counter if torch.cuda.is_available() else time.process_time
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, seconds in zip(calls, times, strict=True):
            begun = clock()
            call()
            if is_cuda:
                torch.cuda.synchronize()
            if number:  # the first call compiles
                seconds.append(clock() - begun)
    return [statistics.median(seconds) for seconds in times]


class MassMeter:
    """A `JointAttention` on one rank that also sums the attention of the image that text and chosen blocks hold.

    `masses` has one list for each way of choosing as many blocks: by the true probabilities, by the estimate, and by an
    estimate from one mean for each block.
    """

    def __init__(self) -> None:
        self.masses: dict[str, list[float]] = {"best": [], "chosen": [], "one mean": []}
        self.kept: list[float] = []

    def __call__(self, qkv: Tensor, text_len: int, image_len: int, mesh: SequenceMesh, kernel: Kernel) -> Tensor:
        if isinstance(kernel, SparseKernel):
            q, k, _ = qkv.unbind(1)
            probability = (torch.einsum("qhd,khd->hqk", q[text_len:], k) * q.shape[-1] ** -0.5).softmax(dim=-1)
            true = _block_means(probability[..., text_len:], kernel.layout)
            images = q[text_len:], k[text_len:], kernel.layout
            estimates = {
                "best": true,
                "chosen": estimate_probabilities(*images),
                "one mean": estimate_probabilities(*images, parts=1),
            }
            for name, estimate in estimates.items():
                kept = choose_blocks(estimate, kernel.layout, kernel.options)
                self.masses[name].append(
                    float((true * kept).sum(-1).mean() + probability[..., :text_len].sum(-1).mean())
                )
            self.kept.append(float(kept.float().mean()))
        return attend_jointly(qkv, text_len, image_len, mesh, kernel)


def _block_means(probability: Tensor, layout: BlockLayout) -> Tensor:
    """[H, N, N] -> [H, n, n]: summed over the keys of a block, averaged over its queries. All blocks are complete."""
    blocks = (layout.blocks, layout.block)
    return probability.unflatten(2, blocks).sum(3).unflatten(1, blocks).mean(2)


@app.command()
def mass(steps: int = 10) -> None:
    """Print the share of the toy's attention that the chosen blocks and the text hold, over all layers and steps."""
    torch.set_num_threads(1)
    base = write_trained_checkpoint(cache_dir())
    tree = CheckpointTree(base)
    model = load_dit(tree, parse_fields(DiTConfig, {}, "dit", tree.dit_options()), "sdpa", torch.float32, CPU)
    _, prompt = next(captioned_scenes(PROMPTS_SEED, LONG["num_frames"], held_out=True))
    with HunyuanVideoPipeline.from_pretrained(base, device="cpu", **FP32) as pipeline:
        videos = plan_videos(prompt, 0, 1, **LONG, **REST, num_inference_steps=steps)
        texts = pipeline.encode(videos)
    branches = [texts[videos[0].prompt]], [texts[videos[0].negative_prompt]]
    print("neighbours  density  kept   best  chosen  one mean")
    for neighbours, density in itertools.product(("none", "faces"), DENSITIES):
        meter = model.joint_attention = MassMeter()
        values = {**TOY_BLOCKS, "neighbours": neighbours, "density": density, "dense_until": 0.0}
        options = SamplingOptions(attention=AttentionMethods(parse_sparse_attention(values)))
        for _ in trajectory(model, videos, *branches, mesh=SequenceMesh.single(), device=CPU, options=options):
            pass
        best, chosen, one_mean = (statistics.mean(masses) for masses in meter.masses.values())
        kept = statistics.mean(meter.kept)
        print(f"{neighbours:>10}  {density:7.2f}  {kept:.2f}  {best:.3f}  {chosen:6.3f}  {one_mean:8.3f}", flush=True)


@app.command()
def quality(prompts: int = 3, steps: int = 50) -> None:
    """Render held-out prompts of the toy, and compare attributes and frames with those of dense attention.

    The videos are those of `step_quality`. Two rows have a step cache, one of them with sparse attention.
    """
    torch.set_num_threads(1)
    base = write_trained_checkpoint(cache_dir())
    scenes = list(islice(captioned_scenes(PROMPTS_SEED, VIDEO["num_frames"], held_out=True), prompts))
    cached = {"step_cache": {"kind": "schedule", "computed": 16}}
    settings: dict[str, dict[str, Any]] = {
        "dense": {},
        **{f"density {density}": _sparse(density) for density in DENSITIES},
        "step cache, 16 computed": cached,
        "step cache, density 0.3": {**_sparse(0.3), **cached},
        "int8": {"quantized_attention": {"qk": "int8", "backend": "reference"}},
        "fp8": {"quantized_attention": {"qk": "fp8", "backend": "reference"}},
        **{f"density {density}, brick {list(FINE_BRICK)}": _sparse(density, FINE_BRICK) for density in DENSITIES},
    }
    reference: list[Frames] = []
    print("| setting | attention | PSNR | attributes |\n|---|---|---|---|")
    for name, options in settings.items():
        frames = list(_render(base, scenes, steps, options))
        reference = reference or frames
        decibels = statistics.mean(psnr(one, other) for one, other in zip(frames, reference, strict=True))
        right = [value for (scene, _), one in zip(scenes, frames, strict=True) for value in _right(scene, one)]
        share = _attention_share(options, steps)
        print(f"| {name} | {share:.2f} | {decibels:.1f} dB | {sum(right)} of {len(right)} |", flush=True)


def _attention_share(options: Mapping[str, Any], steps: int) -> float:
    """Return the attention that a video computes, relative to that of dense steps without a step cache."""
    methods = AttentionMethods(parse_sparse_attention(options.get("sparse_attention")))
    computed = computed_steps(parse_step_cache(options.get("step_cache")), steps)
    return sum(methods.density(step, steps) for step in computed) / steps


def _right(scene: Scene, frames: Frames) -> list[bool]:
    return list(score(scene, frames).right.values())


def _sparse(density: float, brick: tuple[int, int, int] = TOY_BRICK) -> dict[str, Any]:
    return {"sparse_attention": {**TOY_BLOCKS, "density": density, "brick": list(brick)}}


def _render(base: Path, scenes: list[tuple[Scene, str]], steps: int, options: Mapping[str, Any]) -> Iterator[Frames]:
    with HunyuanVideoPipeline.from_pretrained(base, device="cpu", **FP32, **options) as pipeline:
        for seed, (_, prompt) in enumerate(scenes):
            yield pipeline(prompt, seed=seed, num_inference_steps=steps, **VIDEO, **REST)


if __name__ == "__main__":
    app()
