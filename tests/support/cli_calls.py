"""Runs commands in this process."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner

from hv_batch.cli.main import app, main


def hv_batch(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def files(root: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(root).rglob("*")) if path.is_file()}


def run_main(*arguments: Any, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command of `main` in this process, with its handling of errors."""
    stdout, stderr = io.StringIO(), io.StringIO()
    command = patch.object(sys, "argv", ["hv-batch", *map(str, arguments)])
    changed = patch.dict(os.environ, {"RAY_ADDRESS": "", **environment})
    with command, changed, redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main()
            code: Any = 0
        except SystemExit as ended:
            code = ended.code or 0
    if isinstance(code, str):  # Python prints it when it ends the process
        return 1, stdout.getvalue(), f"{stderr.getvalue()}{code}\n"
    return code, stdout.getvalue(), stderr.getvalue()


def json_of(*arguments: Any) -> tuple[int, dict[str, Any]]:
    """Exit code of a command with --json, and the one object that it prints."""
    code, stdout, _ = run_main(*arguments, "--json")
    return code, json.loads(stdout)
