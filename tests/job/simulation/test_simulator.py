"""hv_batch.job.simulation: the accounts of a simulated run are complete, and its results follow from the scenario."""

from __future__ import annotations

import json

import pytest

from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.cost_model.estimate import make_plan
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.simulation.faults import Faults
from hv_batch.job.simulation.ledger import Use
from hv_batch.job.simulation.run_limits import run_limits
from hv_batch.job.simulation.samples import SampleKind, SamplePlan
from hv_batch.job.simulation.scenario import Scenario, parse_scenario, read_scenario
from hv_batch.job.simulation.simulate import simulate
from hv_batch.job.simulation.simulator import Simulator
from hv_batch.job.simulation.step_checkpoints import StepCheckpoints
from hv_batch.protocol import UserError

H100 = GPUS["h100"]


def simulated(scenario, samples=40, groups=3, **kind):
    kind = SampleKind(**{"encode_s": 1.0, "denoise_s": 300.0, "decode_s": 30.0} | kind)
    config = RunConfig.model_validate({"groups": {"count": groups}, "parallel": {"gpus_per_group": 4}})
    plan = SamplePlan([kind], samples, lambda _number: 0, scenario.poisoned, scenario.seed)
    simulator = Simulator(run_limits(resolve_run(config), samples), plan, scenario)
    Faults(simulator, scenario)
    return simulator.run()


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "num_frames": 1}\n{"prompt": "c", "height": 544, "width": 960}\n')
    return [str(path)]


def report(manifest, scenario=None, price=None, samples=30, overrides=()):
    config = load_config("throughput_1gpu", overrides)
    return simulate(config, manifest, H100, scenario or Scenario(), samples, price)


def test_every_gpu_second_has_one_use():
    """The uses add up to the capacity of the cluster, through failures, poisoned samples and the tail."""
    outcome = simulated(Scenario(nodes=3, failures_per_hour=6.0, poisoned=3))
    assert sum(outcome.ledger.seconds.values()) == pytest.approx(3 * 8 * outcome.seconds)
    assert outcome.ledger.seconds[Use.FAILURE] > 3 * 2 * 4 * 280.0, "each poisoned sample is tried twice"
    assert len(outcome.quarantined) == 3
    assert sum(outcome.committed) == 37


def test_lost_nodes_are_not_counted_after_their_end():
    outcome = simulated(Scenario(nodes=3, preemptions_per_hour=2.0, replace_s=(900.0, 900.0)))
    assert outcome.ledger.seconds[Use.PREEMPTION] > 0
    missing = 3 * 8 * outcome.seconds - sum(outcome.ledger.seconds.values())
    assert missing > 0
    assert missing / 8 % 900.0 == pytest.approx(0.0, abs=1.0), "each lost node was missing for 15 minutes"


def test_work_of_an_undisturbed_run_is_that_of_the_model():
    """P4: nothing is rendered twice, and each task takes the time of its kind."""
    outcome = simulated(Scenario(nodes=2, jitter=0.0, turn_s=0.0))
    assert outcome.ledger.seconds[Use.DENOISE] == pytest.approx(40 * 4 * 300.0)
    assert outcome.ledger.seconds[Use.DECODE] == pytest.approx(40 * 30.0)
    assert outcome.ledger.seconds[Use.FAILURE] == outcome.ledger.seconds[Use.PREEMPTION] == 0
    # Start of the run and of the encoders, 14 rounds on three groups, and the last decode.
    assert outcome.seconds == pytest.approx(60 + 120 + 14 * 300 + 30, abs=20)


def test_a_step_checkpoint_bounds_what_a_lost_group_costs():
    """P4: with checkpoints every five of fifty steps, each loss costs at most five steps and the start of a group."""
    faults = {"nodes": 2, "failures_per_hour": 30.0, "jitter": 0.0, "seed": 1}
    outcome = simulated(Scenario(**faults))
    lost = sum(outcome.lost.values())
    assert 0 < lost <= outcome.losses.total() * 4 * 10 * (300.0 / 50), "checkpoint_every is 10"


def test_step_checkpoints_hold_whole_steps():
    checkpoints = StepCheckpoints(10)
    assert checkpoints.begin("s", 50, 100.0, 2.0) == 50
    assert checkpoints.lose("s", 149.0) == 40.0, "24 steps are done, and 20 of them stored"
    assert checkpoints.begin("s", 50, 200.0, 2.0) == 30
    checkpoints.request("s", 205.0)
    assert checkpoints.lose("s", 205.5) == 0.0, "the step of the request has not ended"
    checkpoints.begin("s", 50, 300.0, 2.0)
    checkpoints.request("s", 305.0)
    assert checkpoints.lose("s", 307.0) == 6.0
    checkpoints.forget("s")
    assert checkpoints.begin("s", 50, 400.0, 2.0) == 50


def test_a_report_is_deterministic_and_json(manifest):
    """P3: equal arguments give an equal report; another seed gives another one."""
    busy = Scenario(nodes=2, preemptions_per_hour=1.0, failures_per_hour=2.0)
    first = report(manifest, busy)
    assert first == report(manifest, busy) == json.loads(json.dumps(first))
    assert first != report(manifest, busy.model_copy(update={"seed": 1}))
    assert first["committed"] == first["samples"] == 30


def test_a_quiet_run_takes_the_hours_of_the_plan(manifest):
    """The simulator and `hv-batch plan` use the same times: without faults only start-up and tail are added."""
    samples = 3 * 200
    found = report(manifest, Scenario(start_s=0.0, jitter=0.0), samples=samples)
    plan = make_plan(load_config("throughput_1gpu"), manifest, H100)
    assert found["scenario"]["nodes"] == 1
    hours = plan["estimate"]["h100"]["stage_hours"]["denoise"] * samples / 3
    assert hours < found["makespan_hours"] < 1.05 * hours
    assert found["gpu_hours"]["work"]["denoise"] == pytest.approx(7 * hours, rel=0.001)


def test_a_cost_is_that_of_all_gpu_hours(manifest):
    found = report(manifest, price=2.0)
    assert found["cost"]["total"] == pytest.approx(2 * 8 * found["makespan_hours"])
    assert found["cost"]["a_sample"] == pytest.approx(found["cost"]["total"] / 30)
    assert report(manifest)["cost"] is None


def test_a_night_ends_with_a_drain(manifest):
    """P2, P4: a stop leaves the rest to a resume, and the tail begins with it."""
    found = report(manifest, Scenario(stop_after_s=7200.0), samples=500)
    assert found["drained"]
    assert 0 < found["committed"] < 500
    assert found["makespan_hours"] == pytest.approx(2.0, abs=0.2)


def test_a_cluster_that_is_too_small_is_refused(manifest):
    """P6: a message instead of a simulation without end."""
    with pytest.raises(UserError, match=r"gpus_per_node = 1; allowed: at least 8, which a group"):
        simulate(load_config("720p_8gpu"), manifest, H100, Scenario(gpus_per_node=1))
    with pytest.raises(UserError, match=r"too few GPUs: nothing happened from hour .* Raise nodes"):
        report(manifest, Scenario(nodes=1, gpus_per_node=1), overrides=["decoders.gpus=1", "encoders.gpus=1"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodse": 3}, r"nodse: unknown key. Did you mean nodes\?"),
        ({"nodes": 0, "jitter": 2.0}, "nodes = 0; allowed: .*; jitter = 2.0; allowed: "),
        ({"replace_s": [9.0, 1.0]}, "allowed: the shorter time first"),
        ({"load_s": {"denoise": -1.0}}, r"load_s.denoise = -1.0; allowed: greater than or equal to 0"),
    ],
)
def test_a_wrong_scenario_is_refused_with_all_problems(values, message):
    """P6: the key, its value and what is allowed."""
    with pytest.raises(UserError, match=message):
        parse_scenario(values)


def test_a_scenario_is_read_from_yaml(tmp_path):
    path = tmp_path / "night.yaml"
    path.write_text("nodes: 128\nreplace_s: [60.0, 90.0]\nload_s: {denoise: 200.0}\n")
    scenario = parse_scenario(read_scenario(str(path)))
    assert (scenario.nodes, scenario.replace_s, scenario.load_s.denoise) == (128, (60.0, 90.0), 200.0)
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="a mapping of the keys nodes"):
        read_scenario(str(path))
