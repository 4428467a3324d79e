"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# No example has a deadline: on a busy machine one that needs a millisecond sometimes takes a second.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

pytest_plugins = ["tests.support.logs", "tests.support.s3_runs", "tests.support.stores"]
