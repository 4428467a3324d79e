"""Where a command's log records go: a live bar and plain messages on a terminal, one line a record elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, TextIO, get_args

import typer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hv_batch.job.log_records import LEVEL_VARIABLE, Format, Level, LogSettings, configure_logging
from hv_batch.job.progress import ProgressThrottle, Snapshot
from hv_batch.protocol import UserError

LogLevel = Annotated[
    str | None, typer.Option("--log-level", help=f"{', '.join(get_args(Level))}; default: {LEVEL_VARIABLE}, else info")
]
LogFormat = Annotated[str, typer.Option("--log-format", help="text (a bar on a terminal, else lines) or json")]


def log_settings(level: str | None, format: str) -> LogSettings:
    """Settings from the flags of a command. Raises UserError for a level or format that does not exist."""
    level = (level or os.environ.get(LEVEL_VARIABLE) or "info").lower()
    if level not in get_args(Level):
        raise UserError(
            f"--log-level (or the environment variable {LEVEL_VARIABLE}) is {level!r}; allowed: "
            f"{', '.join(get_args(Level))}."
        )
    if format not in get_args(Format):
        raise UserError(f"--log-format is {format!r}; allowed: {', '.join(get_args(Format))}.")
    return LogSettings(level, format)  # type: ignore[arg-type]  # both are checked above


@contextmanager
def command_logging(settings: LogSettings, stream: TextIO | None = None) -> Iterator[LogSettings]:
    """Write the records of the block to `stream` (default: stderr)."""
    stream = stream or sys.stderr
    console = Console(file=stream, highlight=False, markup=False)
    handler: logging.Handler
    if settings.format == "text" and console.is_terminal and not console.is_dumb_terminal:
        handler = TerminalHandler(console)
    else:
        handler = logging.StreamHandler(stream)
        handler.addFilter(ProgressThrottle())
    configure_logging(settings, handler)
    try:
        yield settings
    finally:
        handler.close()


class TerminalHandler(logging.Handler):
    """Draws progress records as a live bar at the bottom, and prints the message of every other record above it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        snapshot: Snapshot | None = getattr(record, "progress", None)
        if snapshot is None:
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            self._console.print(prefix + self.format(record), soft_wrap=True)
            return
        self._live.start()
        self._live.update(_bar(snapshot), refresh=True)

    def close(self) -> None:
        self._live.stop()
        super().close()


def _bar(snapshot: Snapshot) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=max(1, snapshot.total), completed=snapshot.terminal, width=30), Text(str(snapshot)))
    return row
