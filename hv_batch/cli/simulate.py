"""`hv-batch simulate`: a run on a simulated cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from hv_batch.cli.run_flags import (
    Carry,
    Column,
    Config,
    Duplicates,
    GpuPrice,
    Manifests,
    Overrides,
    with_manifest_flags,
)
from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job.config.run_config import load_config

LOST = {
    "start_up": "start of the run, and loading of workers",
    "preemption": "preempted nodes",
    "failure": "failed tasks and dead workers",
    "idle_groups": "groups that wait for samples",
    "idle_pools": "encoders and decoders that wait for samples",
    "unused": "GPUs without a worker",
    "tail": "idle after the last sample was admitted",
}


def simulate(
    config: Config,
    manifest: Manifests,
    overrides: Overrides = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="render N samples, and repeat the manifest if it has fewer", metavar="N")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(help="YAML file with the cluster and its faults; flags take precedence")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="nodes; default: as many as the config needs")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of a node; default: 8")] = None,
    preemptions_per_hour: Annotated[float | None, typer.Option(help="preempted nodes of the whole cluster")] = None,
    failures_per_hour: Annotated[float | None, typer.Option(help="dying workers of the whole cluster")] = None,
    stop_after_hours: Annotated[float | None, typer.Option(help="drain the run after this time, as --until")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of faults and jitter; default: 0")] = None,
    gpu: Annotated[str | None, typer.Option(help="H100, H200, A100, H20 or L40S; default: the config's gpu")] = None,
    price_gpu_hour: GpuPrice = None,
    column: Column = None,
    carry: Carry = None,
    duplicates: Duplicates = None,
    as_json: Json = False,
) -> None:
    """Simulate a run: makespan, use of the GPUs, lost GPU hours by cause, and cost. Needs no GPU and no weights.

    The scheduler is that of a run; the times of tasks are those of `hv-batch plan`.
    """
    from hv_batch.job.config.hardware import find_gpu
    from hv_batch.job.simulation.scenario import parse_scenario, read_scenario
    from hv_batch.job.simulation.simulate import simulate as simulate_run  # the engine takes seconds to import

    flags = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "preemptions_per_hour": preemptions_per_hour,
        "failures_per_hour": failures_per_hour,
        "stop_after_s": None if stop_after_hours is None else 3600 * stop_after_hours,
        "seed": seed,
    }
    values = read_scenario(scenario) if scenario else {}
    values |= {key: value for key, value in flags.items() if value is not None}
    settings = with_manifest_flags(load_config(config, overrides or []), column, carry, duplicates)
    begun = time.monotonic()
    report = simulate_run(
        settings,
        manifest,
        find_gpu(gpu or settings.gpu or "H100"),
        parse_scenario(values, scenario or "the scenario"),
        samples,
        price_gpu_hour,
    )
    if as_json:
        show_json("hv_batch/simulation/1", report)
    else:
        show("\n".join([*render_simulation(report), f"simulated in {time.monotonic() - begun:.1f} s"]))


def render_simulation(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the report."""
    scenario, hours = report["scenario"], report["gpu_hours"]
    done = f"{report['committed']:,} of {report['samples']:,} samples committed, {report['quarantined']:,} quarantined"
    yield (
        f"{scenario['nodes']} node(s) x {scenario['gpus_per_node']} {report['gpu']}: {done} in "
        f"{report['makespan_hours']:.2f} hours{' (stopped)' if report['drained'] else ''}"
    )
    yield (
        f"{report['utilisation']:.1%} of {hours['total']:,.1f} GPU hours are work, "
        f"{report['denoise_share']:.1%} are denoising"
    )
    yield ""
    yield f"{'work':<50}{'GPU hours':>12}{'share':>8}"
    for stage, each in hours["work"].items():
        yield f"{stage:<50}{each:>12,.1f}{_share(each, hours['total']):>8.1%}"
    yield f"{'lost to':<50}{'GPU hours':>12}{'share':>8}"
    for cause, each in hours["lost"].items():
        yield f"{LOST[cause]:<50}{each:>12,.1f}{_share(each, hours['total']):>8.1%}"
    yield ""
    if lost := report["lost_workers"]:
        yield f"lost workers: {', '.join(f'{count:,} {kind}' for kind, count in lost.items())}"
    if cost := report["cost"]:
        a_sample = "" if cost["a_sample"] is None else f", {cost['a_sample']:,.4g} for each committed sample"
        yield f"cost: {cost['total']:,.2f} at {cost['price_gpu_hour']:g} for a GPU hour{a_sample}"
    yield "the times of tasks are estimates (`hv-batch plan`); faults are random, so compare several seeds"


def _share(part: float, total: float) -> float:
    return part / total if total else 0.0
