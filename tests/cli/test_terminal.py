"""hv_batch.cli.terminal: what a terminal shows of a run, and the logging flags of the commands."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest
from rich.console import Console

from hv_batch.cli.terminal import TerminalHandler, command_logging, log_settings
from hv_batch.job.log_records import LogSettings
from hv_batch.job.progress import Snapshot
from hv_batch.protocol import UserError

# The control sequences that a terminal of one-line bars gets: colours, the cursor's visibility, and the two that erase.
SEQUENCE = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])")


def snapshot(committed: int) -> Snapshot:
    return Snapshot(
        total=9, committed=committed, quarantined=0, done_before=0, starting=0, encoding=1, denoising=2, decoding=2
    )


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after `text`."""
    lines, column, at = [""], 0, 0
    while at < len(text):
        if match := SEQUENCE.match(text, at):
            at = match.end()
            if match[2] == "K":
                lines[-1], column = "", 0
            elif match[2] == "A":
                assert not lines[-1], "the cursor moves up only from an empty line"
                lines.pop()
            continue
        if text[at] == "\n":
            lines.append("")
            column = 0
        elif text[at] == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column] + text[at] + lines[-1][column + 1 :]
            column += 1
        at += 1
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def terminal():
    """A logger whose records go to a TerminalHandler, the handler, and what was written so far."""
    file = io.StringIO()
    handler = TerminalHandler(Console(file=file, force_terminal=True, width=120, highlight=False, markup=False))
    logger = logging.Logger("terminal")
    logger.addHandler(handler)
    yield logger, handler, file.getvalue
    handler.close()


def progress(logger: logging.Logger, committed: int) -> None:
    logger.info("%s", snapshot(committed), extra={"progress": snapshot(committed)})


def test_one_bar_is_drawn_from_progress_records(terminal):
    """A terminal shows the last progress record alone, with the bar and the numbers."""
    logger, _, written = terminal
    progress(logger, 1)
    progress(logger, 3)
    (line,) = screen(written())
    assert "3/9 done · running: 1 encode, 2 denoise, 2 decode" in line
    assert "━" in line


def test_messages_stand_above_the_bar(terminal):
    """A message is kept, the bar stays the last line, and a warning is marked as one."""
    logger, _, written = terminal
    logger.info("starting Ray")
    progress(logger, 1)
    logger.warning("s01 failed")
    progress(logger, 2)
    logger.error("s02 failed")
    progress(logger, 4)
    *messages, bar = screen(written())
    assert messages == ["starting Ray", "warning: s01 failed", "error: s02 failed"]
    assert "4/9 done" in bar


def test_no_bar_is_left_after_the_last_message(terminal, capsys):
    """Commands print their last lines inside the logging block: the message that ends a run has removed the bar."""
    logger, _, written = terminal
    progress(logger, 9)
    print("output of the command")
    logger.info("finished")
    assert screen(written()) == ["finished"]
    assert capsys.readouterr().out == "output of the command\n", "a bar does not redirect stdout"


def test_closing_removes_the_bar(terminal):
    """An exception may end a command without a message."""
    logger, handler, written = terminal
    progress(logger, 5)
    assert screen(written())
    handler.close()
    assert not screen(written())


def test_a_stream_that_is_no_terminal_gets_lines(package_logging):
    """A job log has neither a bar nor control sequences; JSON has none on a terminal either."""
    stream = io.StringIO()
    with command_logging(LogSettings("info", "json"), stream):
        progress(logging.getLogger("hv_batch.test"), 2)
    assert json.loads(stream.getvalue())["progress"]["committed"] == 2
    stream = io.StringIO()
    with command_logging(LogSettings(), stream):
        progress(logging.getLogger("hv_batch.test"), 2)
        logging.getLogger("hv_batch.test").warning("s01 failed")
    first, second = stream.getvalue().splitlines()
    assert " INFO 22% · --/min · ETA --:-- · 2/9 done" in first
    assert second.endswith(" WARNING s01 failed")


@pytest.fixture
def package_logging():
    """The configuration of other tests is restored."""
    package = logging.getLogger("hv_batch")
    before, level = package.handlers, package.level
    yield
    package.handlers, package.level = before, level


def test_the_level_is_the_flags_or_the_environments(monkeypatch):
    """`--log-level`, else HV_BATCH_LOG_LEVEL, else info; the case does not matter."""
    monkeypatch.delenv("HV_BATCH_LOG_LEVEL", raising=False)
    assert log_settings(None, "json") == LogSettings("info", "json")
    monkeypatch.setenv("HV_BATCH_LOG_LEVEL", "WARNING")
    assert log_settings(None, "text").level == "warning"
    assert log_settings("debug", "text").level == "debug"


def test_a_wrong_setting_is_named_with_its_source(monkeypatch):
    """P6: the message names what the user has set, its value, and the allowed values."""
    with pytest.raises(UserError, match=r"^--log-level is 'loud'; allowed: debug, info, warning, error.$"):
        log_settings("loud", "text")
    monkeypatch.setenv("HV_BATCH_LOG_LEVEL", "loud")
    with pytest.raises(UserError, match=r"^The environment variable HV_BATCH_LOG_LEVEL is 'loud'; allowed: "):
        log_settings(None, "text")
    with pytest.raises(UserError, match=r"^--log-format is 'xml'; allowed: text, json.$"):
        log_settings("info", "xml")
