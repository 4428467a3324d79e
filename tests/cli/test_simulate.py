"""`hv-batch simulate`: flags, scenario file and reports; tests/job/simulation tests the simulation itself."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hv_batch.cli.main import app
from hv_batch.protocol import UserError


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "night.yaml").write_text("nodes: 2\nseed: 7\npreemptions_per_hour: 1.0\n")
    return ["--config", "throughput_1gpu", "--manifest", str(tmp_path / "prompts.jsonl"), "--samples", "40"]


def simulate(*arguments):
    result = CliRunner().invoke(app, ["simulate", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_flags_take_precedence_over_the_scenario(arguments, tmp_path):
    flags = ("--seed", "3", "--stop-after-hours", "1", "--json", "groups.count=15")
    report = json.loads(simulate(*arguments, "--scenario", str(tmp_path / "night.yaml"), *flags))
    assert report["schema"] == "hv_batch/simulation/1"
    scenario = report["scenario"]
    assert (scenario["nodes"], scenario["seed"], scenario["preemptions_per_hour"]) == (2, 3, 1.0)
    assert scenario["stop_after_s"] == 3600.0
    assert report["committed"] <= report["samples"] == 40


def test_the_text_names_every_loss_and_the_cost(arguments):
    text = simulate(*arguments, "--price-gpu-hour", "2.5")
    assert "1 node(s) x 8 H100: 40 of 40 samples committed, 0 quarantined in" in text
    for cause in ("preempted nodes", "start of the run", "GPUs without a worker", "idle after the last sample"):
        assert cause in text
    assert "at 2.5 for a GPU hour" in text


def test_a_wrong_scenario_names_its_file(arguments, tmp_path):
    """P6: one paragraph with the file, the key and what is allowed."""
    (tmp_path / "night.yaml").write_text("node: 2\n")
    with pytest.raises(UserError, match=r"night\.yaml: node: unknown key\. Did you mean nodes\?"):
        simulate(*arguments, "--scenario", str(tmp_path / "night.yaml"))
