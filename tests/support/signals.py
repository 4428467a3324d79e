"""The disposition of signals in tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def default_hangup() -> Iterator[None]:
    """SIGHUP has its default action, in children too. `nohup pytest` ignores it, and a command respects that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
