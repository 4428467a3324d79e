"""One real Ray head for all cluster tests, with eight GPUs that do not exist, ended by its process id."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.fleet import descendants, fleet, fleet_head  # noqa: F401  # fixtures of every file here
from tests.support.ray_head import free_port, started_head
from tests.support.repository import ROOT
from tests.support.runs import PROMPTS, render, videos, write_config, write_manifest


@pytest.fixture(scope="session", autouse=True)
def ray_environment():
    """For this process and every Ray process it starts."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # a token in the home folder would outlive the tests
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = str(ROOT)  # where actors find the doubles
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as an activated venv does
    os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def metrics_url():
    """Where Prometheus would scrape the head."""
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="session")
def ray_folder():
    """Where the head keeps its logs and sockets. Not below tmp_path: the length of a socket's path is limited."""
    with tempfile.TemporaryDirectory(prefix="hv-ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def planted_secret():
    """A secret in the environment of the head, and so of the actors, and of the commands. test_logs.py looks for it."""
    os.environ["SERVICE_TOKEN"] = f"planted-{secrets.token_hex(8)}"  # not in this file, which Ray uploads with jobs
    yield os.environ["SERVICE_TOKEN"]
    del os.environ["SERVICE_TOKEN"]


@pytest.fixture(scope="session")
def ray_head(ray_environment, planted_secret, metrics_url, ray_folder, tmp_path_factory):
    """(GCS address, dashboard URL) of `ray start --head --num-gpus 8`."""
    metrics = [f"--metrics-export-port={urlsplit(metrics_url).port}"]
    metrics += ["--system-config", '{"metrics_report_interval_ms": 1000}']  # Ray's own 10 s is long for a test
    metrics += [f"--temp-dir={ray_folder}"]
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
    """Media of samples s00 ... s09, which depend neither on failures nor on prompts that cause them (P3): (name, bytes)
    of each medium.
    """
    return videos(undisturbed / "out").items()
