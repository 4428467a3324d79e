"""The README's `ray job submit`, against a real head node."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

from hv_batch.toy.checkpoint import write_toy_checkpoint
from tests.support.repository import ROOT
from tests.support.runs import count, records, render, write_config, write_manifest

TIMEOUT_S = 120


def ray_job(dashboard, *arguments, timeout=TIMEOUT_S):
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments]
    environment = {**os.environ, "RAY_ADDRESS": dashboard}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=timeout, check=False
    )
    return done.returncode, done.stdout + done.stderr


def submit(dashboard, config, manifest, output, *overrides, flags=()):
    entry = ["python", "jobs/render.py", "--config", str(config), "--manifest", str(manifest), "--output", str(output)]
    return ray_job(dashboard, "submit", "--runtime-env", "jobs/runtime_env.yaml", *flags, "--", *entry, *overrides)


@pytest.mark.slow
def test_the_real_engine_on_eight_ranks(ray_head, tmp_path):
    """A submitted job renders with a group of eight ranks, Ulysses 4 x ring 2, on GPUs that Ray only counts."""
    model_base = write_toy_checkpoint(tmp_path / "ckpts")
    manifest = write_manifest(tmp_path, ["a kite over a green hill", "a kettle in the rain"], num_inference_steps=2)
    output = tmp_path / "out"
    code, text = submit(
        ray_head[1], "configs/fake_gpus_8rank.yaml", manifest, output, f"model.options.model_base={model_base}"
    )
    assert code == 0, text
    assert set(records(output)) == {"s00", "s01"}
    assert "2/2" in text or "2 rendered" in text, "plain progress lines are in the job's log"


@pytest.mark.slow
def test_ray_job_stop_drains(ray_head, tmp_path, marks):
    """`ray job stop` lets the running samples finish, and the same command resumes the run."""
    config, output = write_config(tmp_path, marks, {"step_seconds": 0.3}), tmp_path / "out"
    manifest = write_manifest(tmp_path, [f"prompt {i}" for i in range(6)])
    _, text = submit(ray_head[1], config, manifest, output, flags=("--no-wait",))
    job = re.search(r"raysubmit_\w+", text).group()
    deadline = time.monotonic() + TIMEOUT_S
    while not count(marks, "denoised"):
        assert time.monotonic() < deadline, ray_job(ray_head[1], "logs", job)
        time.sleep(0.1)
    assert json.loads((output / "lease.json").read_text())["job"] == job, "an operator finds the job that writes here"
    ray_job(ray_head[1], "stop", job)
    _, log = ray_job(ray_head[1], "logs", job)
    assert "stopped after" in log, log
    done = len(records(output))
    assert 1 <= done < 6
    assert sum(count(marks, "denoised").values()) == done
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 0, text
    assert len(records(output)) == 6


def test_a_relative_output_is_refused_on_a_cluster(ray_head, tmp_path, marks):
    """P6: a relative path is a different folder on every node."""
    config, manifest = write_config(tmp_path, marks), write_manifest(tmp_path, ["prompt"])
    code, text = submit(ray_head[1], config, manifest, "somewhere")
    assert code != 0
    assert "absolute path" in text
