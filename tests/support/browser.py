"""A headless Chromium for tests of pages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from hv_batch.bench.report_page.browser import chromium
from hv_batch.protocol import UserError


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium of this machine. The tests are skipped if there is none."""
    running = chromium()
    try:
        started = running.__enter__()
    except UserError as error:
        pytest.skip(str(error))
    try:
        yield started
    finally:
        running.__exit__(None, None, None)


def wait_until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Wait until a JavaScript expression is true. `page.wait_for_function` needs a policy that allows `eval`."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not true within {seconds} s: {expression}"
        time.sleep(0.02)
