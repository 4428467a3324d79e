"""`hv-batch init`: the files that it writes run, and it overwrites nothing."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from hv_batch.job.config.run_config import load_config
from tests.support.cli_calls import json_of, run_main
from tests.support.repository import ROOT


def test_the_files_pass_the_check_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, result = json_of("init", tmp_path / "new", "--gpus", "0", "--output", tmp_path / "out")
    assert (code, result["schema"]) == (0, "hv_batch/init/1")
    command = ["run", "--config", result["config"], "--manifest", result["manifest"], "--output", result["output"]]
    code, stdout, stderr = run_main(*command, "--dry-run")
    assert code == 0, stderr
    assert "4 rows, 4 samples" in stdout


def test_files_that_exist_are_kept(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("mine")
    code, _, stderr = run_main("init", tmp_path, "--gpus", "8")
    assert code == 1
    assert "prompts.jsonl exists already" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_five_questions_are_asked_on_a_terminal(tmp_path):
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "hv_batch", "init", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.write(leader, b"8\nA100\nlatency\n/models/hunyuan\ns3://b/run\n")
    stdout, stderr = process.communicate(timeout=60)
    for number in (leader, follower):
        os.close(number)
    assert process.returncode == 0, stderr
    assert stderr.count("?") == 5
    config = load_config(str(tmp_path / "config.yaml"))
    assert (config.gpu, config.parallel.gpus_per_group) == ("A100", 8)
    assert config.model.options["model_base"] == "/models/hunyuan"
    assert "--output s3://b/run" in stdout


@pytest.mark.slow
def test_the_files_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, result = json_of("init", tmp_path / "new", "--gpus", "0", "--output", tmp_path / "out")
    command = ["run", "--config", result["config"], "--manifest", result["manifest"], "--output", result["output"]]
    quick = ["defaults.num_frames=5", "defaults.num_inference_steps=2"]
    arguments = [sys.executable, "-m", "hv_batch", *command, *quick]
    done = subprocess.run(arguments, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": ""}, timeout=280)
    assert done.returncode == 0
