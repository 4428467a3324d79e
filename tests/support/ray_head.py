"""A real Ray head on this machine."""

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

from tests.support.fleet import descendants
from tests.support.repository import ROOT

START_TIMEOUT_S = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def started_head(log: Path, port: int, *arguments: str, **environment: str):
    """Runs `ray start --head` on this machine within the block; yields (GCS address, dashboard URL)."""
    # The local Ray of another test may still use Ray's default ports.
    dashboard, agent, client = (free_port() for _ in range(3))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=300000000", "--node-ip-address=127.0.0.1"]
    command += ["--include-log-monitor=false"]  # sends logs to drivers, which do not ask for them
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
