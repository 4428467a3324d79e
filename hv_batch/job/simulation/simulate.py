"""`hv-batch simulate`: a run of a config on a simulated cluster, as a report."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hv_batch.job.config.hardware import Gpu
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.checked_manifest import checked_manifest
from hv_batch.job.cost_model.estimate import planned_workers, reserved_gpus, stage_seconds
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.simulation.faults import Faults
from hv_batch.job.simulation.fleet import Demand
from hv_batch.job.simulation.ledger import WORK, Use
from hv_batch.job.simulation.run_limits import run_limits
from hv_batch.job.simulation.samples import SamplePlan, predicted_kind
from hv_batch.job.simulation.scenario import Scenario
from hv_batch.job.simulation.simulator import Limits, Outcome, Simulator
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload
from hv_batch.protocol import UserError

HOUR_S = 3600

Report = dict[str, Any]


def simulate(
    config: RunConfig,
    manifest_urls: Sequence[str],
    gpu: Gpu,
    scenario: Scenario,
    samples: int | None = None,
    price: float | None = None,
) -> Report:
    """The JSON-able report of a simulated run; equal for equal arguments.

    The run has the samples of the manifest in its order, or `samples` of them; if there are fewer, the manifest is
    repeated. `price` is that of one GPU for an hour. Raises UserError for what a run would refuse, and for a cluster
    that is too small.
    """
    with checked_manifest(config, Manifest(manifest_urls)) as (index, run):
        numbers: dict[Workload, int] = {}
        order = array("I", (numbers.setdefault(Workload.of(sample.params), len(numbers)) for sample in index))
    if not order:
        raise UserError("The manifest has no samples, so there is nothing to simulate. Give a manifest with rows.")
    count = samples or len(order)
    limits = run_limits(run, count)
    if scenario.nodes is None:
        work = Counter({work: order.count(number) for work, number in numbers.items()})
        scenario = scenario.model_copy(update={"nodes": _needed_nodes(run, work, gpu, limits, scenario.gpus_per_node)})
    _check_cluster(limits, scenario)
    kinds = [predicted_kind(run, work, gpu) for work in numbers]
    plan = SamplePlan(kinds, count, lambda number: order[number % len(order)], scenario.poisoned, scenario.seed)
    simulator = Simulator(limits, plan, scenario)
    Faults(simulator, scenario)
    return _report(simulator.run(), count, scenario, gpu, price)


def _needed_nodes(run: ResolvedRun, work: Counter[Workload], gpu: Gpu, limits: Limits, gpus_per_node: int) -> int:
    """Nodes for all groups of the largest size, and for the encoders and decoders that `hv-batch plan` counts."""
    gpus = reserved_gpus(run, planned_workers(run, stage_seconds(run, work, gpu)))
    group = limits.demands[Stage.DENOISE, 0]
    a_node = max(1, int(gpus_per_node / group.gpus)) if group.gpus else run.config.groups.count
    nodes = max(group.nodes, math.ceil(run.config.groups.count * group.nodes / a_node))
    others = gpus["encoders"] + gpus["decoders"]
    left = nodes * gpus_per_node - run.config.groups.count * group.total
    return nodes + math.ceil(max(0.0, others - left) / gpus_per_node)


def _check_cluster(limits: Limits, scenario: Scenario) -> None:
    """Raises UserError if a node is too small for a worker."""
    largest: Demand = max(limits.demands.values(), key=lambda demand: demand.gpus)
    if largest.gpus > scenario.gpus_per_node:
        raise UserError(
            f"gpus_per_node = {scenario.gpus_per_node}; allowed: at least {largest.gpus:g}, which a group of this "
            "config reserves on a node. Use larger nodes or smaller groups."
        )
    if largest.nodes > (scenario.nodes or 0) + len(scenario.joins_s):
        raise UserError(
            f"nodes = {scenario.nodes}; allowed: at least {largest.nodes}, over which a group of this config extends."
        )


def _report(outcome: Outcome, samples: int, scenario: Scenario, gpu: Gpu, price: float | None) -> Report:
    hours = {use: seconds / HOUR_S for use, seconds in outcome.ledger.seconds.items()}
    total = sum(hours.values())
    work = {use: hours[use] for use in WORK.values()}
    committed = sum(outcome.committed)
    return {
        "samples": samples,
        "committed": committed,
        "quarantined": len(outcome.quarantined),
        "drained": outcome.drained,
        "makespan_hours": outcome.seconds / HOUR_S,
        "first_denoise_hours": None if outcome.first_denoise is None else outcome.first_denoise / HOUR_S,
        "gpu": gpu.name,
        "gpu_hours": {
            "total": total,
            "work": {use.value: each for use, each in work.items()},
            "lost": {use.value: hours[use] for use in Use if use not in work},
        },
        "utilisation": sum(work.values()) / total if total else 0.0,
        "denoise_share": work[Use.DENOISE] / total if total else 0.0,
        "lost_workers": {kind.value: count for kind, count in sorted(outcome.losses.items())},
        "cost": _cost(price, total, committed),
        "scheduler_steps": outcome.steps,
        "scenario": scenario.model_dump(mode="json"),
    }


def _cost(price: float | None, gpu_hours: float, committed: int) -> Report | None:
    if price is None:
        return None
    total = price * gpu_hours
    return {"price_gpu_hour": price, "total": total, "a_sample": total / committed if committed else None}
