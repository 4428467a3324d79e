"""Logging of the commands: a live bar and plain messages on a terminal, one line a record otherwise."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, TextIO, get_args

import typer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hv_batch.job.log_records import LEVEL_VARIABLE, Format, Level, LogSettings, configure_logging
from hv_batch.job.progress import ProgressThrottle, Snapshot
from hv_batch.job.redaction import safe_text
from hv_batch.protocol import UserError

LogLevel = Annotated[
    str | None, typer.Option("--log-level", help=f"{', '.join(get_args(Level))}; default: ${LEVEL_VARIABLE}, else info")
]
LogFormat = Annotated[
    str, typer.Option("--log-format", help="text (a live bar on a terminal, otherwise lines) or json")
]


Json = Annotated[bool, typer.Option("--json", help="print one JSON object with a schema; errors as well")]

FOUND = 3  # exit code: there are faults or differences
ERROR_SCHEMA = "hv_batch/error/1"
UNREACHABLE_REMEDY = (
    "Check the URL, the network, and for an endpoint of your own AWS_ENDPOINT_URL; then run the same command again."
)


def log_settings(level: str | None, format: str) -> LogSettings:
    """Settings from the flags of a command; without a level flag, from the environment.

    Raises UserError if the level or the format does not exist.
    """
    source = "--log-level" if level else f"The environment variable {LEVEL_VARIABLE}"
    level = (level or os.environ.get(LEVEL_VARIABLE) or "info").lower()
    if level not in get_args(Level):
        raise UserError(f"{source} is {level!r}; allowed: {', '.join(get_args(Level))}.")
    if format not in get_args(Format):
        raise UserError(f"--log-format is {format!r}; allowed: {', '.join(get_args(Format))}.")
    return LogSettings(level, format)  # type: ignore[arg-type]  # both are checked above


def show(text: str) -> None:
    """Print the result of a command to stdout, without secrets and control characters of texts from outside."""
    print(safe_text(text), flush=True)


def show_json(schema: str, values: Mapping[str, Any], indent: int | None = 1) -> None:
    """Print the result of a command as one JSON object whose first key names its layout."""
    text = json.dumps({"schema": schema, **values}, indent=indent)
    show(text.replace("\x7f", "\\u007f"))  # the only control character that JSON leaves as it is


def wants_json() -> bool:
    """Whether the command line asks for JSON. Errors need the answer before the flags are parsed."""
    return "--json" in sys.argv[1:]


def fail(message: str, as_json: bool, code: int = 1) -> NoReturn:
    """End the command with an error: a paragraph on stderr, or one JSON object on stdout."""
    if not as_json:
        sys.exit(safe_text(f"error: {message}"))
    show_json(ERROR_SCHEMA, {"error": message, "exit_code": code})
    sys.exit(code)


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
    """Draws progress records as a live bar in the last line, and prints the message of every other record above it.

    A message removes the bar, and the next progress record draws a new one. So no bar is left when a command prints its
    last lines, because every run ends with a message.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live: Live | None = None
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        snapshot: Snapshot | None = getattr(record, "progress", None)
        if snapshot is not None:
            self._draw(snapshot)
            return
        self._stop()
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self._console.print(prefix + self.format(record), soft_wrap=True)

    def close(self) -> None:
        self._stop()
        super().close()

    def _draw(self, snapshot: Snapshot) -> None:
        if self._live is None:
            # stdout belongs to the command's output: rich must not redirect it to this console.
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
        self._live.update(_bar(snapshot), refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _bar(snapshot: Snapshot) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_row(Text(str(snapshot)), ProgressBar(total=max(1, snapshot.total), completed=snapshot.terminal, width=20))
    return row
