"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# No test judges by the clock: on a busy machine an example of a millisecond takes a second now and then.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

pytest_plugins = ["tests.support.logs", "tests.support.s3_runs", "tests.support.stores"]
