"""Calls of hooks: real programs and functions that answer, fail, hang and lie."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hv_batch.job.hooks.call import call_command, call_function, read_answer
from hv_batch.job.hooks.hook import Hook, HookFailedError, HookUnavailableError, parse_hook


def python(code: str) -> Hook:
    return parse_hook(f"{sys.executable} -c {shlex.quote(code)}")


def test_a_command_gets_the_document_and_its_arguments_and_answers():
    hook = python("import json, sys; print(json.dumps([json.load(sys.stdin), sys.argv[1:]]))")
    answer = call_command(hook, json.dumps({"prompt": "狐狸"}).encode(), 30.0, "a b", "c")
    assert read_answer(hook, answer) == [{"prompt": "狐狸"}, ["a b", "c"]]


def test_an_answer_is_json_or_nothing():
    hook = python("pass")
    assert read_answer(hook, b" \n") is None
    for answer in (b"done", b"{", b"[NaN]", b"[" * 100_000, b"\xff"):
        with pytest.raises(HookFailedError, match="not JSON"):
            read_answer(hook, answer)


def test_another_exit_code_is_a_failure_with_the_end_of_stderr():
    """P5: what a program writes to its stderr must not move the cursor of a terminal."""
    hook = python("import sys; sys.stderr.write('x' * 100_000 + '\\x1b[2Jno watermark'); sys.exit(4)")
    with pytest.raises(HookFailedError, match="exit code 4") as caught:
        call_command(hook, b"", 30.0)
    assert str(caught.value).endswith("\\x1b[2Jno watermark")
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        (parse_hook("/no/such/program"), "No such file"),
        (parse_hook("/etc/hostname"), "cannot be started"),
        (parse_hook("env no_such_program"), "was not found"),
        (python("import os; os.kill(os.getpid(), 9)"), "killed by signal 9"),
    ],
)
def test_a_command_that_cannot_run_here_is_the_fault_of_the_node(hook, problem):
    with pytest.raises(HookUnavailableError, match=problem):
        call_command(hook, b"", 30.0)


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path):
    child = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    hook = python(f"import os, time\nif os.fork() == 0:\n    {child}\ntime.sleep(60)")
    begun = time.monotonic()
    with pytest.raises(HookUnavailableError, match=r"did not end within 1\.5 s"):
        call_command(hook, b"", 1.5)
    assert time.monotonic() - begun < 20
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
                return  # killed; its new parent has not waited for it yet
            time.sleep(0.02)
        pytest.fail("the child is still running")


def test_a_command_that_writes_without_end_fails(monkeypatch):
    monkeypatch.setattr("hv_batch.job.hooks.call.MAX_ANSWER_BYTES", 1000)
    with pytest.raises(HookFailedError, match="wrote more than"):
        call_command(python("print('x' * 2000)"), b"", 30.0)


@pytest.fixture
def functions(tmp_path, monkeypatch):
    source = """
import sys, time
def answer(one, two): return {"sum": one + two}
def fail(): raise ValueError("bad \\x1b[2J")
def leave(): sys.exit(0)
def hang(): time.sleep(3)
"""
    (tmp_path / "called_functions.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield "called_functions"
    sys.modules.pop("called_functions", None)


def test_a_function_is_called(functions):
    assert call_function(parse_hook(f"{functions}:answer"), (1, 2), 30.0) == {"sum": 3}
    with pytest.raises(HookFailedError, match=r"raised ValueError: bad \\x1b\[2J"):
        call_function(parse_hook(f"{functions}:fail"), (), 30.0)
    with pytest.raises(HookFailedError, match="raised SystemExit"):
        call_function(parse_hook(f"{functions}:leave"), (), 30.0)
    with pytest.raises(HookUnavailableError, match=r"did not return within 0\.1 s"):
        call_function(parse_hook(f"{functions}:hang"), (), 0.1)
    with pytest.raises(HookUnavailableError, match="cannot be imported"):
        call_function(parse_hook(f"{functions}:absent"), (), 30.0)
