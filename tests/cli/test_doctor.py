"""`hv-batch doctor`: what it finds, that it ends in time, and that its block can be published."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.runtime.nodes.node_checks import clock_offset
from tests.support.cli_calls import files, json_of, run_main
from tests.support.runs import write_config


@pytest.fixture
def config(tmp_path):
    (tmp_path / "marks").mkdir()
    return write_config(tmp_path, tmp_path / "marks")


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a script of this name first on the PATH."""

    def install(script: str) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=":")

    return install


def test_a_healthy_machine_passes_and_nothing_is_left(config, tmp_path):
    before = files(tmp_path)
    code, stdout, _ = run_main("doctor", "--config", config, "--output", tmp_path / "out")
    assert code == 0, stdout
    assert "ok      output root  writable, put-if-absent by exclusive hard link" in stdout
    assert "ok      clock        agrees with the store" in stdout
    assert "encodes h264" in stdout
    assert "0 checks failed" in stdout
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_failed_check_is_the_exit_code(config, tmp_path):
    """Without weights, on a machine without GPU, and with a file in place of the output root."""
    (tmp_path / "file").write_text("in the way")
    where = f"model.options.model_base={tmp_path / 'none'}"
    code, result = json_of("doctor", "--config", "720p_8gpu", "--output", tmp_path / "file", where)
    assert (code, result["schema"], result["ok"]) == (1, "hv_batch/doctor/1", False)
    (machine,) = [checks for name, checks in result["nodes"].items() if name != "ray"]
    failed = {check["name"]: check["detail"] for check in machine if check["status"] == "FAILED"}
    assert {"GPUs", "output root", "weights"} <= failed.keys()
    assert "is a file, or lies below one" in failed["output root"]
    assert str(tmp_path / "none") in failed["weights"]


def test_an_address_without_a_cluster_is_a_failed_check_beside_the_others():
    code, stdout, _ = run_main("doctor", "--address", "127.0.0.1:9")
    assert code == 1
    assert "FAILED  ray          No Ray cluster answers at 127.0.0.1:9" in stdout
    assert "ffmpeg" in stdout


def test_gpus_are_listed_with_their_driver(nvidia_smi):
    nvidia_smi("echo 'NVIDIA H100, 81559 MiB, 570.1'; echo 'NVIDIA H100, 81559 MiB, 570.1'")
    _, stdout, _ = run_main("doctor")
    assert "GPUs         0: NVIDIA H100, 81559 MiB, 570.1; 1: NVIDIA H100" in stdout


def test_a_driver_that_hangs_is_reported_in_time(nvidia_smi):
    nvidia_smi("exec sleep 60")
    begun = time.monotonic()
    code, stdout, _ = run_main("doctor", "--timeout", "2")
    assert time.monotonic() - begun < 30
    assert code == 1
    assert "FAILED  GPUs         did not end within 2 s" in stdout
    assert "ok      open files" in stdout or "WARNING" in stdout


def test_the_block_has_no_secret(tmp_path):
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "planted-secret-1",
        "HF_TOKEN": "planted-secret-2",
        "RAY_AUTH_TOKEN": "planted-3",
    }
    url = {"AWS_ENDPOINT_URL": "http://user:planted-4@127.0.0.1:9"}
    for flags in ([], ["--json"]):
        _, stdout, stderr = run_main("doctor", *flags, **secrets, **url)
        assert "127.0.0.1:9" in stdout
        assert "planted" not in stdout + stderr


@given(st.floats(-1000, 1000), st.floats(0, 5), st.floats(0, 5), st.booleans())
def test_the_offset_of_a_clock_is_never_overestimated(offset, before, after, cuts):
    """`offset`: seconds that this clock is ahead. The store gives its time between the two readings."""
    stored = 1e9 + before
    begun, ended = 1e9 + offset, 1e9 + before + after + offset
    found = clock_offset(begun, float(int(stored)) if cuts else stored, ended)
    assert abs(found) <= abs(offset) + 1e-6
    assert found * offset >= 0
    assert abs(found) >= abs(offset) - before - after - 2
