"""`hv-batch bench`: the command line of the measurements."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(help="Measure how fast this machine is.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure how fast this machine is."""


@app.command()
def engine(
    preset: Annotated[str | None, typer.Option(help="toy, mid, 540p or 720p; default: mid on a CPU, else 720p")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU if there is one")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; default: as many as PyTorch takes")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often hv_batch and diffusers take turns")] = 3,
    stage: Annotated[list[str] | None, typer.Option(help="text, dit or vae; repeat it; default: all")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="let hv_batch compute the DiT's products in FP8")] = False,
    attention: Annotated[str, typer.Option(help="of hv_batch's DiT: sdpa, cudnn, flash or math")] = "sdpa",
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Time text encoding, one DiT step and the tiled VAE decode, with random weights, next to diffusers.

    `of peak` is measured against the best large matrix product of this device in the stage's precision; `memory` is
    what a run took on top of its models.
    """
    import torch  # with the engine, seconds to import

    from hv_batch.bench.engine_stages import HEADER, bench_engine, describe, find_device, missing_reference
    from hv_batch.bench.stage_workloads import STAGES

    if threads:
        torch.set_num_threads(threads)
    place = find_device(device)
    preset = preset or ("720p" if place.type == "cuda" else "mid")
    reports = bench_engine(preset, place, stage or list(STAGES), rounds, fp8=fp8, attention=attention)
    if as_json:
        found = {"machine": describe(place), "preset": preset, "stages": [report.to_dict() for report in reports]}
        print(json.dumps(found, indent=1))
        return
    lines = (f"{describe(place)}; preset {preset}", missing_reference(), HEADER)
    print(*filter(None, lines), sep="\n", flush=True)
    for report in reports:
        print(report.render(), flush=True)


@app.command()
def job(
    samples: Annotated[
        int, typer.Option(min=2, help="to render; of far fewer, the pace is that of queues that fill")
    ] = 4000,
    groups: Annotated[int, typer.Option(min=1, help="denoise groups of one rank")] = 2,
    decoders: Annotated[int, typer.Option(min=1, help="VAE decoders")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="of a denoise")] = 1,
    step_seconds: Annotated[float, typer.Option(min=0.0, help="that a step sleeps")] = 0.0,
    frames: Annotated[int, typer.Option(min=1, help="1: a PNG; 4n + 1: an mp4")] = 1,
    committed: Annotated[
        int, typer.Option(min=0, help="samples before these, which an earlier run has committed; it is made up")
    ] = 0,
    rows: Annotated[int, typer.Option(min=0, help="of the manifest, if more; the rest is left pending")] = 0,
    form: Annotated[str, typer.Option("--format", help="of the manifest: jsonl, jsonl.gz or parquet")] = "jsonl",
    with_ray_data: Annotated[
        bool,
        typer.Option("--with-ray-data", help="then the same samples through Ray Data's map_batches, as a yardstick"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Time the job around the model, which only sleeps: committed samples a second, their CPU time, the driver's
    memory, and how long it takes from the command to the first denoise.
    """
    from hv_batch.bench.job_throughput import Load, bench_job

    load = Load(
        samples=samples,
        groups=groups,
        decoders=decoders,
        steps=steps,
        step_seconds=step_seconds,
        frames=frames,
        committed=committed,
        rows=rows,
        format=form,
    )
    report = bench_job(load, with_ray_data=with_ray_data)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.render())


@app.command("group")
def denoise_group(
    ranks: Annotated[int, typer.Option(min=1, help="of the group that loses one")] = 4,
    kills: Annotated[int, typer.Option(min=0, help="how often it does; 0: leave this out")] = 5,
    groups: Annotated[int, typer.Option(min=0, help="of one rank, which render side by side; 0: leave this out")] = 8,
    samples: Annotated[int, typer.Option(min=2, help="that each of them renders")] = 6,
    steps: Annotated[int, typer.Option(min=1, help="of a sample")] = 10,
    step_seconds: Annotated[float, typer.Option(min=0.0, help="that a step sleeps")] = 1.0,
    frames: Annotated[int, typer.Option(min=1, help="1: a PNG; 4n + 1: an mp4")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Time the life of denoise groups: the rebuild after a killed rank, and how long groups wait between two samples.

    The model only sleeps. The ranks meet over gloo and make every step together; samples are decoded and committed.
    """
    from hv_batch.bench.recovery import bench_idle, bench_rebuild

    rebuild = bench_rebuild(ranks, kills) if kills else None
    idle = bench_idle(groups, groups * samples, steps, step_seconds, frames) if groups else None
    if as_json:
        found = {"rebuild": rebuild and rebuild.to_dict(), "idle": idle and idle.to_dict()}
        print(json.dumps(found, indent=1))
    else:
        print(*(report.render() for report in (rebuild, idle) if report), sep="\n")
