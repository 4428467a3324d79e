"""Programs that stand in for those of a cluster, in tests of scripts that call them."""

from __future__ import annotations

import os
from pathlib import Path


def pretend(folder: Path, name: str, script: str) -> None:
    """Write the program `name`, a script of bash, into `folder`."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def seeing(folder: Path, **more: str) -> dict[str, str]:
    """The environment of this process, in which the programs of `folder` come first."""
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **more}
