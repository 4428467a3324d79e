"""Small file systems in memory that can be filled, where this process may mount them."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

BALLAST = "ballast"


def mount(folder: Path, size: int) -> bool:
    """Mount a file system of `size` bytes on a folder. Returns False without the right to do so."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    """At once, although processes may still have files there."""
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> bool:
    """Fill the file system of a folder but for a few bytes. Returns False if it is full already."""
    if (folder / BALLAST).exists():
        return False
    with (folder / BALLAST).open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return True


def empty(folder: Path) -> None:
    (folder / BALLAST).unlink(missing_ok=True)
