"""What the package logs during a test."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from hv_batch.job.log_records import PACKAGE


class ListHandler(logging.Handler):
    """Collects the messages of the records."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The messages of all records of level INFO and above, in order, as they come."""
    logger, handler = logging.getLogger(PACKAGE), ListHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.messages
    logger.removeHandler(handler)
    logger.setLevel(level)
