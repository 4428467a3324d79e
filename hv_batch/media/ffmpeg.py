"""Start ffmpeg so that equal frames give equal bytes on every machine of one CPU architecture (P3).

Two things besides frames and settings can change the bytes of an encoder. Both are fixed here:

- *The CPU's instruction set.* libx264 computes the weights of its macroblock tree in floating point, and its code for
  AVX-512 gives other weights than its code for AVX2. So the encoders use AVX2 if the CPU has it (`instruction_set`).
- *Memory that is read before it is written*, as the same code of libx264 does. glibc fills all memory that it allocates
  with zeros if two environment variables are set (`encoder_environment`). Other C libraries ignore the setting.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from hv_batch.protocol import UserError

CPUINFO = Path("/proc/cpuinfo")

REMEDY = "Install imageio-ffmpeg again, or set IMAGEIO_FFMPEG_EXE on every node to an ffmpeg that works."

# glibc fills allocated memory with the complement of `perturb`. It leaves out memory of its per-thread cache, so there
# must be none, and memory that the kernel has just mapped, which is zero.
_ZEROED_MEMORY = {
    "MALLOC_PERTURB_": "255",
    "GLIBC_TUNABLES": "glibc.malloc.perturb=255:glibc.malloc.tcache_count=0",
}


class FfmpegError(UserError):
    """The ffmpeg of this machine is missing, cannot be started, or failed; the message is for the user."""


def find_ffmpeg() -> str:
    """Return the path of ffmpeg. Raises FfmpegError if there is none, or if it is not an executable file."""
    try:
        path: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise FfmpegError(
            "There is no ffmpeg: the package imageio-ffmpeg was installed without one, PATH has none, and "
            f"IMAGEIO_FFMPEG_EXE is not set. {REMEDY}"
        ) from None
    found = shutil.which(path)
    if found is None:
        problem = "is not an executable file" if os.path.exists(path) else "does not exist"
        raise FfmpegError(f"The ffmpeg {path} {problem}. {REMEDY}")
    return found


def start_ffmpeg(arguments: Sequence[str], **pipes: Any) -> subprocess.Popen[bytes]:
    """Start ffmpeg with `pipes`, keyword arguments of `Popen`. Raises FfmpegError if it cannot be started.

    Its session is new: Ctrl-C goes to the whole process group of the terminal, but must not stop the encoder of a
    sample that finishes during a drain.
    """
    ffmpeg = find_ffmpeg()
    try:
        return subprocess.Popen([ffmpeg, *arguments], env=encoder_environment(), start_new_session=True, **pipes)
    except OSError as error:
        raise FfmpegError(f"The ffmpeg {ffmpeg} cannot be started: {error.strerror or error}. {REMEDY}") from error


def kill_ffmpeg(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, if it runs: the program may be a script that starts the real ffmpeg."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def encoder_environment() -> dict[str, str]:
    """Return this process's environment, with the settings that make glibc fill allocated memory with zeros."""
    return {**os.environ, **_ZEROED_MEMORY}


def instruction_set() -> str | None:
    """Return the value of the option `asm` of x264, x265 and SVT-AV1; None if they must choose by themselves.

    They do not check the value against the CPU, so it must be None on a CPU without AVX2.
    """
    return "avx2" if _cpu_has_avx2() else None


@cache
def _cpu_has_avx2() -> bool:
    """Whether Linux reports AVX2. False on other systems and on other CPU architectures."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return False
    return "avx2" in next((line for line in lines if line.startswith("flags")), "").split()
