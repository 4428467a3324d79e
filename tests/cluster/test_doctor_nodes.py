"""`hv-batch doctor --address`: every node of a cluster makes the checks itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.repository import ROOT


@pytest.mark.slow
def test_every_node_is_checked_by_a_task_there(ray_head):
    address = ray_head[0]
    command = [sys.executable, "-m", "hv_batch", "doctor", "--address", address, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=180)
    result = json.loads(done.stdout)
    assert done.returncode == (0 if result["ok"] else 1), done.stderr
    (cluster,) = result["nodes"]["ray"]
    assert f"at {address}, 1 node(s)" in cluster["detail"]
    (node,) = [checks for name, checks in result["nodes"].items() if name.startswith("node ")]
    assert {"versions", "ffmpeg", "/dev/shm", "disk"} <= {check["name"] for check in node}
