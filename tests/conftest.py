"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# No example has a deadline: on a busy machine one that needs a millisecond sometimes takes a second.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Runs of the tests are resumed by their output roots alone. A root may name only engines that the operator knows.
os.environ["HV_BATCH_ENGINES"] = "tests.support.doubles:FakeEngine,tests.support.faulty_engine:FaultyVideo"

pytest_plugins = ["tests.support.logs", "tests.support.s3_runs", "tests.support.signals", "tests.support.stores"]
