"""hv_batch.job.simulation: a simulated run takes as long as a real one on a local Ray with an engine that sleeps."""

from __future__ import annotations

import pytest

from hv_batch.bench.job_throughput import Load, bench_job, job_config
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.simulation.run_limits import run_limits
from hv_batch.job.simulation.samples import SampleKind, SamplePlan
from hv_batch.job.simulation.scenario import LoadTimes, Scenario
from hv_batch.job.simulation.simulator import Simulator

DECODE_S = 0.03  # of a picture of 64x64, with its upload: measured; the engine's decode takes no time


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "samples", "step_seconds"), [(2, 25, 0.2), (4, 50, 0.2)])
def test_a_simulated_run_takes_as_long_as_a_real_one(groups, samples, step_seconds):
    """The makespan agrees within 5 %: full rounds of denoises, and a last round in which some groups are idle."""
    load = Load(samples=samples, groups=groups, decoders=1, steps=10, step_seconds=step_seconds, frames=1)
    real = bench_job(load).makespan_s
    kind = SampleKind(encode_s=0.0, denoise_s=10 * step_seconds, decode_s=DECODE_S, steps=10)
    scenario = Scenario(nodes=1, start_s=0.0, load_s=LoadTimes(encode=0.0, denoise=0.0, decode=0.0), jitter=0.0)
    limits = run_limits(resolve_run(job_config(load)), samples)
    outcome = Simulator(limits, SamplePlan([kind], samples, lambda _number: 0), scenario).run()
    simulated = outcome.seconds - outcome.first_denoise
    print(f"{groups} groups: {simulated:.1f} s simulated, {real:.1f} s real, ratio {simulated / real:.3f}")
    assert simulated == pytest.approx(real, rel=0.05)
