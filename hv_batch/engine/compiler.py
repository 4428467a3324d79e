"""Whether torch.compile can generate code on a machine."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import torch


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks to generate code for `device`, as a phrase; None if it lacks nothing."""
    if device.type == "cuda":
        return None if find_spec("triton") else "the package triton"
    return None if any(map(shutil.which, ("g++", "clang++"))) else "a C++ compiler (g++)"
