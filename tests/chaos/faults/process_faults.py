"""What happens to processes, and files that processes read meanwhile."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """A reader finds the old text or the new one."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def send(pid: int, number: signal.Signals) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def limit_memory(pid: int) -> bool:
    """Limit the address space of a process to what it has."""
    with suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
        return True
    return False


def end_limit(pid: int) -> None:
    with suppress(OSError):
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
