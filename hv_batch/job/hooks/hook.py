"""A hook: a program or a Python function of the user that a run calls.

It is written as one text: an import path `package.module:function`, or a command line. A command gets a JSON document
on its standard input, and answers with its exit code and, if it has something to say, a JSON document on its standard
output. It is not run by a shell.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hv_batch.job.redaction import public_text, safe_text

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class HookUnavailableError(Exception):
    """The hook cannot be run on this node: not found, not executable, killed, or not finished in time."""


class HookFailedError(Exception):
    """The hook has refused its input: it exited with another code than 0, raised, or answered something invalid."""


@dataclass(frozen=True, slots=True)
class Hook:
    """`text` as the user has written it; `arguments` are those of a command, empty for a function."""

    text: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """The text for messages: without secrets and control characters."""
        return safe_text(self.text)

    @property
    def is_function(self) -> bool:
        return not self.arguments


def parse_hook(text: str) -> Hook:
    """The hook that `text` names. Raises ValueError with what is allowed if it is neither path nor command."""
    if _IMPORT_PATH.fullmatch(text):
        return Hook(text, ())
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"a command line that can be split into words ({error})") from None
    if not arguments or "\0" in text:
        raise ValueError("a command line, or an import path package.module:function")
    return Hook(text, tuple(arguments))


def describe_hook(hook: Hook) -> dict[str, Any]:
    """What identifies a hook: its name, and a hash of its content, for the identity of a run (P3).

    The content is the source of a function's module, or the program of a command and every file that its arguments
    name. Raises HookUnavailableError if the hook does not exist here.
    """
    digest = hashlib.sha256()
    for path in _module_files(hook) if hook.is_function else _command_files(hook):
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise HookUnavailableError(f"{path} cannot be read: {error.strerror}") from None
    return {"name": public_text(hook.text), "sha256": digest.hexdigest()}


def _module_files(hook: Hook) -> list[Path]:
    module = hook.text.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise HookUnavailableError(f"the module {module} cannot be imported: {error}") from None
    if found is None or not found.origin:
        raise HookUnavailableError(f"there is no module {module}")
    return [Path(found.origin)]


def _command_files(hook: Hook) -> list[Path]:
    program, *rest = hook.arguments
    found = shutil.which(program)
    if found is None:
        problem = "is not executable" if Path(program).is_file() else "does not exist"
        raise HookUnavailableError(f"the program {program} {problem}")
    return [Path(found), *(Path(argument) for argument in rest if _is_file(argument))]


def _is_file(argument: str) -> bool:
    try:
        return Path(argument).is_file()
    except OSError:  # longer than any path
        return False
