"""Logging of a run: the driver and all actors write records in the same format.

Modules log through `logging.getLogger(__name__)`. `configure_logging` attaches one handler to the package's logger,
in the driver and in each actor. Each record has the fields run, worker, sample and attempt, so that a search for a
sample's key in all logs of a cluster returns its whole history. A filter of the handler removes secrets and control
characters before a formatter processes the record.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from hv_batch.job.redaction import safe_text, secret_values

PACKAGE = "hv_batch"
LEVEL_VARIABLE = "HV_BATCH_LOG_LEVEL"
FIELDS = ("run", "worker", "sample", "attempt")

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Level and format of the records. The run context carries the driver's settings to the actors."""

    level: Level = "info"
    format: Format = "text"


_process_fields: Mapping[str, Any] = {}
_settings: LogSettings | None = None  # of this process
_context_fields: ContextVar[Mapping[str, Any]] = ContextVar("log_fields", default={})  # noqa: B039  # never mutated


@contextmanager
def log_fields(**fields: Any) -> Iterator[None]:
    """Add fields, named in `FIELDS`, to all records of this thread within the block."""
    token = _context_fields.set({**_context_fields.get(), **fields})
    try:
        yield
    finally:
        _context_fields.reset(token)


def configure_logging(settings: LogSettings, handler: logging.Handler | None = None, **fields: Any) -> None:
    """Write the package's records through `handler` (default: stderr), and add `fields` to each.

    Replaces the handler of an earlier call.
    """
    global _process_fields, _settings
    _process_fields, _settings = fields, settings
    handler = handler or logging.StreamHandler(sys.stderr)
    if handler.formatter is None:
        handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
    handler.addFilter(_add_fields)
    handler.addFilter(SafeTextFilter(os.environ))
    logger = logging.getLogger(PACKAGE)
    logger.handlers = [handler]
    logger.setLevel(settings.level.upper())


def current_settings() -> LogSettings:
    """The settings of this process, for the processes that it starts."""
    return _settings or LogSettings()


def add_process_fields(**fields: Any) -> None:
    """Add fields, named in `FIELDS`, to all further records of this process."""
    global _process_fields
    _process_fields = {**_process_fields, **fields}


def _add_fields(record: logging.LogRecord) -> bool:
    fields = {**_process_fields, **_context_fields.get()}
    for name in FIELDS:
        if not hasattr(record, name):
            setattr(record, name, fields.get(name))
    return True


class SafeTextFilter(logging.Filter):
    """Removes secrets and control characters from records (`redaction.safe_text`): message, traceback and fields."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__()
        self._secrets = secret_values(environment)

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._clean(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.exc_text = self._clean(record.exc_text) if record.exc_text else None
        record.exc_info = None
        for name in FIELDS:
            if isinstance(value := getattr(record, name, None), str):
                setattr(record, name, self._clean(value))
        return True

    def _clean(self, text: str) -> str:
        return safe_text(text, self._secrets)


class TextFormatter(logging.Formatter):
    """`2026-11-28 12:18:53 INFO message [worker=denoise-0.0 sample=a attempt=1]`."""

    def format(self, record: logging.LogRecord) -> str:
        known = " ".join(f"{name}={value}" for name in FIELDS if (value := getattr(record, name, None)) is not None)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{when} {record.levelname} {record.getMessage()}" + (f" [{known}]" if known else "")
        line = f"{line}\n{record.exc_text}" if record.exc_text else line
        return line.replace("\n", "\n    ")  # a text of several lines cannot look like further records


class JsonFormatter(logging.Formatter):
    """One JSON object per line. `time` is UTC; `progress` has the numbers of a progress record."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        values |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if snapshot := getattr(record, "progress", None):
            values["progress"] = snapshot.to_dict()
        if record.exc_text:
            values["exception"] = record.exc_text
        return json.dumps(values)
