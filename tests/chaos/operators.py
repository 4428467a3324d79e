"""Commands on the output root of a run that is in work, some of which are killed."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.chaos.schedule import Event
from tests.support.repository import ROOT

LIMIT_S = 120.0  # for a command
EXITS = (-signal.SIGKILL, 0, 1, 3)  # 1 with a message: the root is busy, or its store does not answer

# Those that change the root are refused while a driver holds its lease.
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("status",),
    ("report",),
    ("verify", "--sample-decode", "3"),
    ("gc", "--yes"),
    ("retry", "--class", "infra", "--yes"),
)


class Operators:
    def __init__(self, program: Sequence[str], environment: Mapping[str, str], url: str, folder: Path) -> None:
        self._program, self._environment, self._url, self._folder = program, dict(environment), url, folder
        self._running: list[tuple[subprocess.Popen, float, Path]] = []  # with its limit and its output
        self._started = 0

    @property
    def are_busy(self) -> bool:
        return bool(self._running)

    def start(self, event: Event) -> Callable[[], None]:
        """Start a command. The result kills it."""
        name, *flags = event.pick(COMMANDS)
        self._started += 1
        path = self._folder / f"command-{self._started}.log"
        arguments = [*self._program, name, self._url, *flags]
        with path.open("w") as log:
            process = subprocess.Popen(arguments, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT)
        self._running.append((process, time.monotonic() + LIMIT_S, path))
        return process.kill

    def watch(self, now: float) -> list[str]:
        """What is wrong with commands that have ended, or that do not end."""
        found = []
        for entry in list(self._running):
            process, limit, path = entry
            if process.poll() is None and now <= limit:
                continue
            self._running.remove(entry)
            text = path.read_text()
            if process.poll() is None:
                found.append(f"{process.args} does not end: {text[-2000:]}")
                process.kill()
            elif "Traceback" in text or process.returncode not in EXITS:
                found.append(f"{process.args} ends with {process.returncode}: {text[-2000:]}")
        return found

    def close(self) -> None:
        for process, *_ in self._running:
            process.kill()
            process.wait()
