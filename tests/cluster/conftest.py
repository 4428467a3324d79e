"""One real Ray head for all cluster tests, with eight GPUs that do not exist, ended by its process id."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.cluster.fleet import fleet, fleet_head  # noqa: F401  # fixtures of every file here

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60


@pytest.fixture(scope="session", autouse=True)
def ray_environment():
    """For this process and every Ray process it starts."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # a token in the home folder would outlive the tests
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = str(ROOT)  # where actors find the doubles
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as an activated venv does
    os.environ.pop("RAY_ADDRESS", None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def metrics_url():
    """Where Prometheus would scrape the head."""
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="session")
def ray_head(ray_environment, metrics_url, tmp_path_factory):
    """(GCS address, dashboard URL) of `ray start --head --num-gpus 8`."""
    # Ray's fixed default ports may be taken by the local Ray of another test that is just ending.
    port, dashboard, agent, client = (free_port() for _ in range(4))
    log = tmp_path_factory.mktemp("head") / "log.txt"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=8", "--num-gpus=8", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=300000000", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    command += [f"--metrics-export-port={urlsplit(metrics_url).port}"]
    command += ["--system-config", '{"metrics_report_interval_ms": 500}']  # Ray's own 10 s is long for a test
    with log.open("w") as output:
        # A session of its own, so that everything it starts can be ended as one group.
        head = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, cwd=ROOT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not re.search(r"Ray runtime started", log.read_text()):
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


@pytest.fixture
def marks(tmp_path):
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder
