"""Watches what a reader does: the files that it opens, sockets and processes, its time and its memory.

Files that a C or Rust library opens by itself raise no audit event; the readers pass paths only to safetensors.
"""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.repository import ROOT

# Where modules, their data and facts of the process are read from, at a first import for example.
READABLE = (
    str(ROOT),
    sys.prefix,
    sys.base_prefix,
    sysconfig.get_paths()["stdlib"],
    "/proc/",
    "/sys/",
    "/dev/",
    "/usr/",
)
FORBIDDEN = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "pty.",
)
CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


class HangError(BaseException):
    """A reader has not ended in time. No `except Exception` catches it."""


@dataclass
class Watch:
    folder: str  # the only one in which files may be written
    seen: list[str] = field(default_factory=list)  # what was forbidden
    cpu_s: float = 0.0
    peak_bytes: int = 0  # of the process, above what it had before

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event}{arguments!r}"[:300])
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not self._is_inside(path) and ((writes and path != os.devnull) or not path.startswith(READABLE)):
                self.seen.append(f"open {path} {'to write' if writes else ''}")
        elif event in CHANGING and isinstance(arguments[0], str) and not self._is_inside(arguments[0]):
            self.seen.append(f"{event} {arguments[0]}")

    def _is_inside(self, path: str) -> bool:
        if not os.path.isabs(path):  # the store names its files relative to an open folder
            return ".." not in path.split(os.sep)
        path = os.path.normpath(path)
        return path == self.folder or path.startswith(self.folder + os.sep)


_current: Watch | None = None
_is_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _current is not None and (event == "open" or event.startswith(FORBIDDEN) or event in CHANGING):
        _current.audit(event, arguments)


@contextmanager
def watched(folder: Path, limit_s: float) -> Iterator[Watch]:
    """Watch this process. Raises HangError in the main thread after `limit_s` seconds of CPU time."""
    global _current, _is_installed
    if not _is_installed:
        sys.addaudithook(_hook)  # it stays for the life of the process, and does nothing outside of this block
        _is_installed = True
    watch = Watch(os.path.realpath(folder))

    def stop(*_: Any) -> None:
        raise HangError(f"no result after {limit_s:g} s of CPU time")

    former = signal.signal(signal.SIGVTALRM, stop)
    before, started = _resident("VmRSS"), time.process_time()
    _forget_peak()
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    _current = watch
    try:
        yield watch
    finally:
        _current = None
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
        watch.cpu_s = time.process_time() - started
        watch.peak_bytes = max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return 0


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
