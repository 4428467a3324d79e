"""Settings of all tests."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# No example has a deadline: on a busy machine one that needs a millisecond sometimes takes a second. There are
# half as many examples as by default, because every run of the suite draws others.
settings.register_profile("untimed", deadline=None, max_examples=50)
settings.load_profile("untimed")

# The processes of `pytest -n` share the cores. Threads of PyTorch that wait for each other would double their time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Runs of the tests are resumed by their output roots alone. A root may name only engines that the operator knows.
os.environ["HV_BATCH_ENGINES"] = "tests.support.doubles:FakeEngine,tests.support.faulty_engine:FaultyVideo"


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("fuzz", "readers with damaged inputs (tests/fuzz)")
    group.addoption("--fuzz-minutes", type=float, default=5.0, help="of `pytest -m fuzz`, over all targets")
    group.addoption("--seed", type=int, default=1, help="of the inputs, or of the first chaos run; each further adds 1")
    group = parser.getgroup("chaos", "runs with injected faults (tests/chaos)")
    group.addoption("--chaos-minutes", type=float, default=5.0, help="no further run is started after that")


class OneRayProcess(LoadFileScheduling):
    """The tests of a file run in one process, and so do all tests in tests/cluster, which share a Ray head."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: Any, log: Any) -> OneRayProcess | None:
    return OneRayProcess(config, log) if config.getvalue("dist") == "loadfile" else None


pytest_plugins = [
    "tests.support.browser",
    "tests.support.logs",
    "tests.support.report_pages",
    "tests.support.s3_runs",
    "tests.support.signals",
    "tests.support.stores",
]
