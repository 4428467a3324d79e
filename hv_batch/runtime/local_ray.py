"""A local Ray in a session of its own, which ends with the process that started it.

A signal to the process group of the driver (Ctrl-C in a terminal, systemd, `timeout`, `kill -- -PGID`) must not reach
Ray, because the driver drains after it. So a helper process, which is this file run as a script, starts Ray in a new
session. It ends Ray when its standard input closes, which happens even if the driver is killed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

END_S = 15.0  # Ray ends within a second or two; then its processes are killed
SHOWN_CHARS = 2000  # of what a helper printed that died


class LocalRayError(Exception):
    """The local Ray did not start."""


@contextmanager
def local_ray(options: Mapping[str, Any]) -> Iterator[str]:
    """Run a local Ray within the block; yields its address. `options` are keyword arguments of `ray.init`.

    Raises LocalRayError with Ray's own reason if it does not start.
    """
    with tempfile.TemporaryFile() as printed:
        # -P: this file's folder must not become the first folder of the modules that Ray and its workers import.
        helper = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__)), json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            start_new_session=True,
        )
        wait_s = END_S
        try:
            yield _address(helper, printed)
        except KeyboardInterrupt:
            wait_s = 0.0
            raise
        finally:
            _end(helper, wait_s)


def _address(helper: subprocess.Popen[bytes], printed: Any) -> str:
    assert helper.stdout is not None
    line = helper.stdout.readline()
    if line:
        report = json.loads(line)
        if "address" in report:
            return str(report["address"])
        raise LocalRayError(report["error"])
    printed.seek(0)
    text = printed.read().decode(errors="replace").strip()[-SHOWN_CHARS:]
    raise LocalRayError(f"its process ended with exit code {helper.wait()}: {text}")


def _end(helper: subprocess.Popen[bytes], wait_s: float) -> None:
    """Let the helper end Ray, and kill what is left of its session after `wait_s`."""
    assert helper.stdin is not None
    assert helper.stdout is not None
    helper.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        if wait_s:
            helper.wait(wait_s)
    with suppress(ProcessLookupError):
        os.killpg(helper.pid, signal.SIGKILL)
    helper.wait()
    helper.stdout.close()


def _run_helper() -> None:
    """Start Ray, write one JSON line with its address or the error to stdout, and end Ray at the end of stdin."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints must not be taken for the report
    import ray

    try:
        options = json.loads(sys.argv[1])
        context = ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # noqa: BLE001  # Ray raises bare exceptions, and the driver reports any
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=report, flush=True)
        os._exit(1)
    print(json.dumps({"address": context.address_info["gcs_address"]}), file=report, flush=True)
    sys.stdin.buffer.read()
    ray.shutdown()


if __name__ == "__main__":
    _run_helper()
