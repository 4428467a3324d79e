"""One real Ray head for all cluster tests, with eight GPUs that do not exist, ended by its process id."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.cluster.fleet import descendants, fleet, fleet_head  # noqa: F401  # fixtures of every file here
from tests.cluster.runs import PROMPTS, render, videos, write_config, write_manifest

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


@contextmanager
def started_head(log: Path, port: int, *arguments: str, **environment: str):
    """(GCS address, dashboard URL) of a `ray start --head` on this machine, for the length of a `with`."""
    # Ray's fixed default ports may be taken by the local Ray of another test that is just ending.
    dashboard, agent, client = (free_port() for _ in range(3))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=300000000", "--node-ip-address=127.0.0.1"]
    command += arguments
    with log.open("w") as output:
        # A session of its own, so that everything it starts can be ended as one group.
        head = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, cwd=ROOT, env=os.environ | environment
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not re.search(r"Ray runtime started", log.read_text()):
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    finally:
        children = descendants(head.pid)
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        for child in children:  # nodes that an autoscaler has started outlive it
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


@pytest.fixture(scope="session")
def ray_head(ray_environment, metrics_url, tmp_path_factory):
    """(GCS address, dashboard URL) of `ray start --head --num-gpus 8`."""
    metrics = [f"--metrics-export-port={urlsplit(metrics_url).port}"]
    metrics += ["--system-config", '{"metrics_report_interval_ms": 500}']  # Ray's own 10 s is long for a test
    log = tmp_path_factory.mktemp("head") / "log.txt"
    with started_head(log, free_port(), "--num-cpus=8", "--num-gpus=8", *metrics) as addresses:
        yield addresses


@pytest.fixture
def marks(tmp_path):
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def undisturbed(ray_head, tmp_path_factory):
    """The folder of a run of PROMPTS, of groups of two ranks, in which nothing goes wrong; "out" is its output root."""
    folder = tmp_path_factory.mktemp("undisturbed")
    marks = folder / "marks"
    marks.mkdir()
    config, manifest = write_config(folder, marks), write_manifest(folder, PROMPTS)
    code, text = render(config, manifest, folder / "out", ray_head[0])
    assert code == 0, text
    return folder


@pytest.fixture(scope="session")
def expected(undisturbed):
    """What samples s00 ... s09 come to, whatever befalls them and whatever their prompts say of it (P3): (name, bytes)
    of each medium.
    """
    return videos(undisturbed / "out").items()
