"""Calls a hook with a time limit, and reads its answer."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from hv_batch.job.hooks.hook import Hook, HookFailedError, HookUnavailableError
from hv_batch.job.redaction import safe_text

MAX_ANSWER_BYTES = 256 * 2**20  # a part of the index has a few MB, or a little more than the longest rows
MAX_ERROR_CHARS = 2000  # the last ones of a command's stderr, for the message
NOT_STARTED = {126: "is not executable", 127: "was not found"}  # exit codes of env and sh
KILL_GRACE_S = 5.0


def call_command(hook: Hook, given: bytes, timeout_s: float, *further: str) -> bytes:
    """Run the command with `further` arguments and `given` on its stdin. Returns what it has written to stdout.

    At the time limit, the command and the processes that it has started are killed. Raises HookUnavailableError and
    HookFailedError.
    """
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as errors:
        stdin.write(given)
        stdin.seek(0)
        try:
            process = subprocess.Popen(
                [*hook.arguments, *further], stdin=stdin, stdout=answer, stderr=errors, start_new_session=True
            )
        except OSError as error:
            raise HookUnavailableError(f"the hook {hook.name} cannot be started: {error.strerror}") from None
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise HookUnavailableError(f"the hook {hook.name} did not end within {timeout_s:g} s") from None
        finally:
            _kill(process)
        _check_status(hook, status, errors)
        if answer.seek(0, os.SEEK_END) > MAX_ANSWER_BYTES:
            raise HookFailedError(f"the hook {hook.name} wrote more than {MAX_ANSWER_BYTES >> 20} MiB to its stdout")
        answer.seek(0)
        return answer.read()


def call_function(hook: Hook, arguments: Sequence[Any], timeout_s: float) -> Any:
    """Call the function in a thread. Returns what it returns. Raises HookUnavailableError and HookFailedError.

    A function cannot be killed: after a timeout its thread goes on until its process ends.
    """
    module, _, name = hook.text.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module may raise anything
        raise HookUnavailableError(f"the hook {hook.name} cannot be imported: {_describe(error)}") from error
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(function(*arguments))
        except BaseException as error:  # noqa: BLE001  # also SystemExit: it must not pass for an answer
            outcome.append(_Raised(error))

    thread = threading.Thread(target=work, daemon=True, name="hook")
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise HookUnavailableError(f"the hook {hook.name} did not return within {timeout_s:g} s")
    if isinstance(outcome[0], _Raised):
        cause = outcome[0].error
        raise HookFailedError(f"the hook {hook.name} raised {_describe(cause)}") from cause
    return outcome[0]


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def read_answer(hook: Hook, answer: bytes) -> Any:
    """The JSON value in the answer of a command; None if it is blank. Raises HookFailedError if it is not JSON."""
    text = answer.decode("utf-8", "replace").strip()
    if not text:
        return None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        shown = safe_text(text[:MAX_ERROR_CHARS])
        raise HookFailedError(f"the hook {hook.name} wrote to its stdout what is not JSON: {shown}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_status(hook: Hook, status: int, errors: IO[bytes]) -> None:
    if status == 0:
        return
    if status in NOT_STARTED:
        raise HookUnavailableError(f"a program of the hook {hook.name} {NOT_STARTED[status]}: {_tail(errors)}")
    if status < 0:  # usually the kernel's out-of-memory killer
        raise HookUnavailableError(f"the hook {hook.name} was killed by signal {-status}: {_tail(errors)}")
    raise HookFailedError(f"the hook {hook.name} ended with exit code {status}: {_tail(errors)}")


def _tail(errors: IO[bytes]) -> str:
    """The end of what a command has written to stderr, safe for a terminal."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 4 * MAX_ERROR_CHARS))
    text = errors.read().decode("utf-8", "replace").strip()
    return safe_text(text)[-MAX_ERROR_CHARS:] or "no message on stderr"


def _describe(error: BaseException) -> str:
    return safe_text(f"{type(error).__name__}: {error}")[:MAX_ERROR_CHARS]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the command's process group, and reap the command."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_GRACE_S)
