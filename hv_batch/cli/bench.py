"""`hv-batch bench`: the commands that measure speed."""

from __future__ import annotations

from typing import Annotated

import typer

from hv_batch.cli.terminal import Json, show_json

app = typer.Typer(help="Measure how fast this machine is.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure how fast this machine is."""


@app.command()
def engine(
    preset: Annotated[str | None, typer.Option(help="toy, mid, 540p or 720p; default: mid on a CPU, else 720p")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto (the GPU if there is one)")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's default")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="timed runs of each implementation, in alternation")] = 3,
    stage: Annotated[list[str] | None, typer.Option(help="text, dit or vae; repeatable; default: all")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="compute the matrix products of hv_batch's DiT in FP8")] = False,
    attention: Annotated[
        str, typer.Option(help="attention kernel of hv_batch's DiT: sdpa, cudnn, flash, fa3, fa4 or math")
    ] = "sdpa",
    as_json: Json = False,
) -> None:
    """Time text encoding, one DiT step and the tiled VAE decode with random weights, and diffusers if it is installed.

    `of peak` is relative to the fastest large matrix product that was measured on this device in the dtype of the
    stage. `memory` is the peak above the memory of the models.
    """
    import torch  # takes seconds to import, like the engine

    from hv_batch.bench.engine_stages import HEADER, bench_engine, describe_device, find_device, missing_reference
    from hv_batch.bench.stage_workloads import STAGES

    if threads:
        torch.set_num_threads(threads)
    place = find_device(device)
    preset = preset or ("720p" if place.type == "cuda" else "mid")
    reports = bench_engine(preset, place, stage or list(STAGES), rounds, fp8=fp8, attention=attention)
    if as_json:
        stages = [report.to_dict() for report in reports]
        result = {"machine": describe_device(place), "preset": preset, "stages": stages}
        show_json("hv_batch/bench-engine/1", result)
        return
    lines = (f"{describe_device(place)}; preset {preset}", missing_reference(), HEADER)
    print(*filter(None, lines), sep="\n", flush=True)
    for report in reports:
        print(report.render(), flush=True)


@app.command()
def job(
    samples: Annotated[
        int, typer.Option(min=2, help="samples to render; with far fewer, queues do not reach a steady state")
    ] = 4000,
    groups: Annotated[int, typer.Option(min=1, help="denoise groups of one rank")] = 2,
    decoders: Annotated[int, typer.Option(min=1, help="VAE decoders")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="steps of a denoise")] = 1,
    step_seconds: Annotated[float, typer.Option(min=0.0, help="seconds that a step sleeps")] = 0.0,
    frames: Annotated[int, typer.Option(min=1, help="frames of a sample; 1: a PNG; 4n + 1: an mp4")] = 1,
    committed: Annotated[
        int, typer.Option(min=0, help="samples that a synthetic earlier run has committed, before the rendered ones")
    ] = 0,
    rows: Annotated[
        int, typer.Option(min=0, help="rows of the manifest, if more; the remaining rows stay pending")
    ] = 0,
    form: Annotated[str, typer.Option("--format", help="format of the manifest: jsonl, jsonl.gz or parquet")] = "jsonl",
    with_ray_data: Annotated[
        bool,
        typer.Option("--with-ray-data", help="also render the samples with Ray Data's map_batches, as a baseline"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the job without a model (the engine sleeps): committed samples per second, CPU time per sample, the
    memory of the driver, and the time from the command to the first denoise.
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
    if as_json:
        show_json("hv_batch/bench-job/1", report.to_dict())
    else:
        print(report.render())


@app.command("group")
def denoise_group(
    ranks: Annotated[int, typer.Option(min=1, help="ranks of the group whose ranks are killed")] = 4,
    kills: Annotated[int, typer.Option(min=0, help="number of kills; 0: skip this measurement")] = 5,
    groups: Annotated[
        int, typer.Option(min=0, help="groups of one rank that render in parallel; 0: skip this measurement")
    ] = 8,
    samples: Annotated[int, typer.Option(min=2, help="samples of each of these groups")] = 6,
    steps: Annotated[int, typer.Option(min=1, help="steps of a sample")] = 10,
    step_seconds: Annotated[float, typer.Option(min=0.0, help="seconds that a step sleeps")] = 1.0,
    frames: Annotated[int, typer.Option(min=1, help="frames of a sample; 1: a PNG; 4n + 1: an mp4")] = 9,
    as_json: Json = False,
) -> None:
    """Measure denoise groups: the recovery after a killed rank, and the idle time of groups between two samples.

    The engine sleeps. The ranks form a gloo process group and synchronize at every step; samples are decoded and
    committed.
    """
    from hv_batch.bench.recovery import bench_idle, bench_rebuild

    rebuild = bench_rebuild(ranks, kills) if kills else None
    idle = bench_idle(groups, groups * samples, steps, step_seconds, frames) if groups else None
    if as_json:
        result = {"rebuild": rebuild and rebuild.to_dict(), "idle": idle and idle.to_dict()}
        show_json("hv_batch/bench-group/1", result)
    else:
        print(*(report.render() for report in (rebuild, idle) if report), sep="\n")


@app.command()
def report(
    samples: Annotated[
        list[int] | None, typer.Option(min=1, help="samples of a root; repeatable; default: 10000")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the first and the next report of a synthetic output root, its memory, and the size of its page."""
    from hv_batch.bench.report.update_speed import bench_report

    reports = [bench_report(count) for count in samples or [10_000]]
    if as_json:
        show_json("hv_batch/bench-report/1", {"reports": [report.to_dict() for report in reports]})
    else:
        print(*(report.render() for report in reports), sep="\n")


@app.command()
def scheduler(
    groups: Annotated[
        list[int] | None, typer.Option(min=1, help="denoise groups; repeatable; default: 125, 512 and 1024")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="tasks that end in a round")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds of each number of groups, in alternation")] = 5,
    as_json: Json = False,
) -> None:
    """Measure the CPU time of one step of the scheduler with few and with many groups, which must be about equal."""
    from hv_batch.bench.scheduler_steps import bench_scheduler

    reports = bench_scheduler(groups or [125, 512, 1024], tasks, rounds)
    if as_json:
        show_json("hv_batch/bench-scheduler/1", {"schedulers": [report.to_dict() for report in reports]})
    else:
        print(*(report.render() for report in reports), sep="\n")
