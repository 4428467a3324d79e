"""hv_batch.job.simulation: a simulated run takes as long as a real one on a local Ray with an engine that sleeps."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from datetime import datetime

import pytest

from hv_batch.bench.job_throughput import Load, job_config, rendered
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.simulation.faults import Faults
from hv_batch.job.simulation.fleet import Demand
from hv_batch.job.simulation.run_limits import run_limits
from hv_batch.job.simulation.samples import SampleKind, SamplePlan
from hv_batch.job.simulation.scenario import LoadTimes, Scenario
from hv_batch.job.simulation.simulator import Simulator
from hv_batch.job.stages import Stage

STEPS = 10


def measure(output):
    """Of a finished run: makespan, the beginning of the first denoise of each group, mean seconds of the tasks."""
    begins, ends, denoises, decodes = {}, [], [], []
    for path in output.glob("commits/*/[!.]*.json"):
        record = json.loads(path.read_text())
        end, stages = datetime.fromisoformat(record["created_at"]).timestamp(), record["stages"]
        begin, group = end - stages["denoise"] - stages["decode"], record["places"]["denoise"]["worker"]
        begins[group] = min(begin, begins.get(group, begin))
        ends.append(end)
        denoises.append(stages["denoise"])
        decodes.append(stages["decode"])
    first = min(begins.values())
    starts = sorted(begin - first for begin in begins.values())
    return max(ends) - first, starts, statistics.fmean(denoises), statistics.fmean(decodes)


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "samples"), [(2, 25), (4, 50)])
def test_a_simulated_run_takes_as_long_as_a_real_one(groups, samples):
    """The makespan agrees within 5 %: full rounds of denoises, and a last round in which some groups are idle.

    The simulation gets the start of each group and the mean time of a task from the real run, because both depend on
    the load of the machine. Each group has a node, which joins when the real group was ready.
    """
    load = Load(samples=samples, groups=groups, decoders=1, steps=STEPS, step_seconds=0.2, frames=1)
    with rendered(job_config(load), samples) as output:
        real, starts, denoise_s, decode_s = measure(output)
    assert len(starts) == groups
    limits = run_limits(resolve_run(job_config(load)), samples)
    limits = replace(limits, demands={**limits.demands, (Stage.DENOISE, 0): Demand(1.0)})
    scenario = Scenario(
        nodes=1,
        gpus_per_node=1,
        joins_s=tuple(starts[1:]),
        start_s=0.0,
        load_s=LoadTimes(encode=0.0, denoise=0.0, decode=0.0),
        jitter=0.0,
    )
    kind = SampleKind(encode_s=0.0, denoise_s=denoise_s, decode_s=decode_s, steps=STEPS)
    simulator = Simulator(limits, SamplePlan([kind], samples, lambda _number: 0), scenario)
    Faults(simulator, scenario)
    outcome = simulator.run()
    simulated = outcome.seconds - outcome.first_denoise
    print(f"{groups} groups: {simulated:.1f} s simulated, {real:.1f} s real, ratio {simulated / real:.3f}")
    assert simulated == pytest.approx(real, rel=0.05)
