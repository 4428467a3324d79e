"""A stop means exit code 143 and one sentence at every moment, to the process or to its whole process group (E6)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.support.fleet import descendants
from tests.support.repository import ROOT
from tests.support.runs import count, finish, render, start, wait_for, write_config, write_manifest

MAIN = "from hv_batch.__main__ import main; main()"
# The moments at which a real run is too fast to be met: it reports them, and then takes long.
HELD = """
import time
from pathlib import Path
from hv_batch.runtime import render

def hold(*arguments):
    Path({mark!r}).touch()
    time.sleep(60)

render.{name} = hold
"""


def handles(process: subprocess.Popen, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def validates(process: subprocess.Popen) -> bool:
    """Whether child processes validate the manifest."""
    return any(b"spawn_main" in command_line(pid) for pid in descendants(process.pid))


def send(process: subprocess.Popen, number: int, who: str) -> None:
    if who == "group":
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def launched(command: str, folder: Path, marks: Path, prompts, program: str = "", **options) -> subprocess.Popen:
    """`run` or `nightly` on a local Ray, in a process group of its own."""
    config = write_config(folder, marks, options, groups={"gpus_per_rank": 0, "cpus_per_rank": 0.1})
    manifest = write_manifest(folder, prompts)
    arguments = ["--config", config, "--manifest", manifest, "--output", folder / "out"]
    if command == "nightly":
        night = folder / "2026-11-20"
        night.mkdir()
        manifest.rename(night / manifest.name)
        arguments = ["--config", config, "--manifest", folder / "{date}" / manifest.name, "--output", folder / "out"]
        arguments += ["--date", "2026-11-20"]
    program = [sys.executable, "-c", f"{program}\n{MAIN}", command]
    return start([*program, *map(str, arguments)], start_new_session=True)


def assert_stopped(process: subprocess.Popen, command: str, output: Path) -> str:
    code, text = finish(process, timeout=90)
    assert code == 143, text
    assert "Traceback" not in text
    *messages, last = text.splitlines()
    messages = messages if command == "nightly" else [*messages, last]
    assert sum("stopped" in message for message in messages) == 1, text
    assert not list(output.rglob("lease.json"))
    if command == "nightly":
        line = json.loads(last)
        assert (line["outcome"], line["exit_code"]) == ("stopped", 143)
    return text


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_stop_while_the_command_is_imported(number, ray_environment):
    """The handlers are installed before the imports, which take a second or more."""
    process = start([sys.executable, "-m", "hv_batch", "nightly", "--help"], start_new_session=True)
    wait_for(lambda: handles(process, signal.SIGTERM), "the handlers, of which this one is the last")
    send(process, number, "process")
    code, text = finish(process, timeout=30)
    assert code == 143, text
    message, line = text.splitlines()
    assert message == f"stopped by {number.name}; run the same command again"
    assert json.loads(line)["outcome"] == "stopped"


@pytest.mark.parametrize(
    ("number", "who"),
    [
        (signal.SIGTERM, "group"),
        pytest.param(signal.SIGTERM, "process", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "group", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "process", marks=pytest.mark.slow),
    ],
)
def test_a_stop_during_the_manifest_check(number, who, ray_environment, tmp_path, marks):
    """The processes that validate rows are not taken for ones that the system has killed."""
    prompts = [f"a prompt of many words, number {i}" * 100 for i in range(4_000)]
    process = launched("run", tmp_path, marks, prompts)
    wait_for(lambda: validates(process), "validating processes")
    send(process, number, who)
    assert_stopped(process, "run", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "nightly"])
@pytest.mark.parametrize("who", ["process", "group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["start", "denoise", "summary"])
def test_a_stop_at_any_moment(moment, number, who, command, ray_environment, tmp_path, marks):
    """While Ray starts, while samples are rendered, and while the summary is written."""
    if command == "nightly" and (number, who) != (signal.SIGTERM, "group"):
        pytest.skip("one signal is enough for the other command")
    program = HELD.format(mark=str(marks / "summary"), name="aggregate") if moment == "summary" else ""
    process = launched(command, tmp_path, marks, ["one"], program, step_seconds=0.5)
    if moment == "start":
        wait_for(lambda: "starting Ray" in process.stdout.readline(), "the start of Ray")
        wait_for(lambda: any_ray(process), "Ray's processes")
    else:
        mark = {"denoise": "denoising", "summary": "summary"}[moment]
        url = None
        while not url:
            line = process.stdout.readline()
            assert line, "the command has ended"
            url = re.search(r"metrics for Prometheus: (http://\S+)", line)
        wait_for(lambda: (marks / mark).exists(), moment)
        if moment == "denoise":
            with urlopen(url[1], timeout=10) as answer:  # the exporter of a local Ray asks for no token
                assert b"ray_" in answer.read()
    children = descendants(process.pid)
    send(process, number, who)
    text = assert_stopped(process, command, tmp_path / "out")
    if moment == "denoise":
        assert "1 rendered" in text, "the running sample was finished"
    wait_for(lambda: not any(is_running(pid) for pid in children), "the end of the local Ray")


def any_ray(process: subprocess.Popen) -> bool:
    return any(b"gcs_server" in command_line(pid) for pid in descendants(process.pid))


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["broken", "full", "closed"])
def test_a_run_needs_no_stderr(stderr, ray_head, tmp_path, marks):
    """A closed pipe, a pipe that nobody reads, and a descriptor that is not open do not end a run."""
    config, manifest = write_config(tmp_path, marks), write_manifest(tmp_path, ["one"])
    arguments = ["run", "--config", config, "--manifest", manifest, "--output", tmp_path / "out"]
    arguments = [sys.executable, "-m", "hv_batch", *map(str, arguments), "--address", ray_head[0]]
    reader, writer = os.pipe()
    if stderr == "broken":
        os.close(reader)
    if stderr == "full":
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b" " * 65536)
        os.set_blocking(writer, True)
    if stderr == "closed":
        arguments = ["sh", "-c", 'exec "$@" 2>&-', "sh", *arguments]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=writer)
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.slow
def test_timeout_ends_a_run_in_order(ray_environment, tmp_path, marks):
    """`timeout` signals the command and then its group: that is one request, so the running sample is finished."""
    config = write_config(tmp_path, marks, {"step_seconds": 2.0}, groups={"gpus_per_rank": 0, "cpus_per_rank": 0.1})
    arguments = [
        "run",
        "--config",
        config,
        "--manifest",
        write_manifest(tmp_path, ["one"]),
        "--output",
        tmp_path / "out",
    ]
    process = start([sys.executable, "-m", "hv_batch", *map(str, arguments)], start_new_session=True)
    wait_for(lambda: count(marks, "steps"), "a step")
    process.send_signal(signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    code, text = finish(process)
    assert code == 143, text
    assert "1 rendered" in text
    code, text = render(config, tmp_path / "manifest.jsonl", tmp_path / "out")
    assert code == 0, text
