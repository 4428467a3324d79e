"""The checks of `hv-batch doctor` that are made on each machine: what a worker of a run would need there.

All checks of a machine run at the same time, each in a thread, and each has a deadline: a mount or a driver that hangs
is one of the faults to be found. A check returns what it has found. It does not raise.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata

from hv_batch import __version__
from hv_batch.job.config.engine_factory import build_engine
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import MediaConfig
from hv_batch.job.formatting import plural, size
from hv_batch.job.redaction import safe_text
from hv_batch.job.storage.put_if_absent import PutIfAbsent
from hv_batch.job.storage.store import Store
from hv_batch.media.codecs import encoders
from hv_batch.media.encoder_check import available_encoders, check_encoder
from hv_batch.media.ffmpeg import find_ffmpeg
from hv_batch.protocol import Device

PACKAGES = ("ray", "torch", "transformers", "pyarrow", "fsspec", "s3fs", "gcsfs", "adlfs", "flash-attn", "xfuser")

MIN_SHM_BYTES = 2 * 2**30  # below it Ray keeps its objects on a disk; Docker's default is 64 MB
MIN_OPEN_FILES = 4096  # each worker of Ray holds some; Ray itself advises 65,536
MIN_FREE_BYTES = 10 * 2**30  # of the temporary folder: Ray's logs and spilled objects, and the spool
MAX_DISK_USE = 0.95  # Ray writes no more objects to a fuller disk
MAX_CLOCK_S = 5.0  # a store compares to the second
FATAL_CLOCK_S = 300.0  # S3 refuses requests that are 15 minutes off; other stores less


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what it was about, and what it has found."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class NodeRequest:
    """What to check on a machine. Without a config, the defaults of the media and no weights are checked."""

    config: RunConfig | None
    output: str | None
    timeout_s: float

    @property
    def device(self) -> Device | None:
        return self.config.parallel.device if self.config else None


def check_node(request: NodeRequest) -> tuple[str, list[Check]]:
    """The name of this machine and its checks, after at most `timeout_s` seconds."""
    deadline, found = time.monotonic() + request.timeout_s, dict[str, Check]()
    checks = _checks(request)

    def run(name: str, check: Callable[[NodeRequest], tuple[Status, str]]) -> None:
        try:
            status, detail = check(request)
        except Exception as error:  # noqa: BLE001  # whatever a driver raises is the finding
            status, detail = Status.FAILED, str(error) or type(error).__name__
        found[name] = Check(name, status, safe_text(detail))

    threads = {name: threading.Thread(target=run, args=(name, check), daemon=True) for name, check in checks.items()}
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    late = Status.FAILED, f"did not end within {request.timeout_s:g} s"
    return socket.gethostname(), [found.get(name) or Check(name, *late) for name in checks]


def _checks(request: NodeRequest) -> Mapping[str, Callable[[NodeRequest], tuple[Status, str]]]:
    checks = {
        "versions": _versions,
        "GPUs": _gpus,
        "NCCL": _nccl,
        "ffmpeg": _ffmpeg,
        "/dev/shm": _shared_memory,
        "open files": _open_files,
        "disk": _disk,
    }
    if request.output:
        checks |= {"output root": _output_root, "clock": _clock}
    if request.config:
        checks["weights"] = _weights
    return checks


def _versions(request: NodeRequest) -> tuple[Status, str]:
    versions = [f"hv_batch {__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return Status.OK, f"{', '.join(versions)}; {platform.system()} {platform.release()} {platform.machine()}"


def _gpus(request: NodeRequest) -> tuple[Status, str]:
    gpus, problem = _query_gpus()
    if gpus:
        return Status.OK, "; ".join(gpus)
    if request.device == "cpu":
        return Status.OK, "none, and the config needs none (parallel.device: cpu)"
    detail = f"none: {problem}. Rendering needs NVIDIA GPUs with their driver; parallel.device=cpu is for tests"
    return (Status.FAILED if request.device == "cuda" else Status.WARNING), detail


def _query_gpus() -> tuple[list[str], str]:
    """One line for each GPU, and why there are none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return [], "nvidia-smi is not installed"
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi did not answer within 30 s, so the driver hangs"
    if done.returncode:
        return [], " ".join((done.stdout + done.stderr).split())
    return [f"{i}: {line.strip()}" for i, line in enumerate(done.stdout.strip().splitlines())], "it lists no GPU"


def _nccl(request: NodeRequest) -> tuple[Status, str]:
    import torch  # takes seconds

    if torch.version.cuda is None:
        detail = f"PyTorch {torch.__version__} is built without CUDA"
        return (Status.FAILED if request.device == "cuda" else Status.OK), detail
    version = ".".join(map(str, torch.cuda.nccl.version()))
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")]
    return Status.OK, f"NCCL {version}, CUDA {torch.version.cuda}{''.join(f', {setting}' for setting in settings)}"


def _ffmpeg(request: NodeRequest) -> tuple[Status, str]:
    path = find_ffmpeg()
    available = available_encoders(path)
    codecs = [codec for codec, encoder in encoders(MediaConfig()).items() if encoder in available]
    check_encoder(request.config.media if request.config else MediaConfig())
    return Status.OK, f"{path} encodes {', '.join(codecs)}"


def _shared_memory(request: NodeRequest) -> tuple[Status, str]:
    usage = shutil.disk_usage("/dev/shm")
    detail = f"{size(usage.free)} of {size(usage.total)} free"
    if usage.total >= MIN_SHM_BYTES:
        return Status.OK, detail
    return Status.WARNING, f"{detail}: Ray needs about {size(MIN_SHM_BYTES)}; in Docker, use --shm-size"


def _open_files(request: NodeRequest) -> tuple[Status, str]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (resource.RLIM_INFINITY, -1) or soft >= MIN_OPEN_FILES:
        return Status.OK, f"limit {soft} (hard {hard})"
    return Status.WARNING, f"limit {soft} (hard {hard}): Ray may run out of them; use `ulimit -n 65536`"


def _disk(request: NodeRequest) -> tuple[Status, str]:
    folder = (request.config and request.config.output.spool_folder) or os.environ.get("RAY_TMPDIR")
    folder = folder or tempfile.gettempdir()
    usage = shutil.disk_usage(folder)
    detail = f"{folder} has {size(usage.free)} of {size(usage.total)} free"
    if usage.used > MAX_DISK_USE * (usage.used + usage.free):
        return Status.FAILED, f"{detail}: Ray stops to write objects at {MAX_DISK_USE:.0%} of use"
    if usage.free < MIN_FREE_BYTES:
        return Status.WARNING, f"{detail}: logs, spilled objects and the spool need about {size(MIN_FREE_BYTES)}"
    return Status.OK, detail


_root_in_use = threading.Lock()  # two checks create and remove the folder of a new local root


def _output_root(request: NodeRequest) -> tuple[Status, str]:
    with _root_in_use:
        how = Store(str(request.output)).probe()
    if how is PutIfAbsent.UNSAFE:
        return Status.WARNING, how.warning or ""
    return Status.OK, f"writable, put-if-absent by {how.value}"


def _clock(request: NodeRequest) -> tuple[Status, str]:
    """The clock of this machine against that of the store, which is what its lease and its signatures use."""
    begun, stored, ended = _timed_write(Store(str(request.output)))
    ahead = clock_offset(begun, stored, ended)
    if abs(ahead) < MAX_CLOCK_S:
        return Status.OK, "agrees with the store"
    status = Status.FAILED if abs(ahead) > FATAL_CLOCK_S else Status.WARNING
    direction = "ahead of" if ahead > 0 else "behind"
    return status, f"{abs(ahead):.0f} s {direction} the store. Set the clock, for example by NTP"


def _timed_write(store: Store) -> tuple[float, float, float]:
    """The time before a write, the time that the store gives it, and the time after it."""
    key = f".probe-{uuid.uuid4().hex}"
    with _root_in_use:
        is_new = "://" not in store.url and not os.path.lexists(store.url)
        begun = time.time()
        store.put(key, b"clock")
        ended = time.time()
        try:
            return begun, store.modified(key), ended
        finally:
            store.delete(key)
            if is_new:
                with suppress(OSError):  # another writer has used the folder meanwhile
                    os.rmdir(store.url)


def clock_offset(begun: float, stored: float, ended: float) -> float:
    """Seconds that this clock is certainly ahead of the store's (negative: behind), if a write took from `begun` to
    `ended` and the store's time is `stored`, perhaps cut to whole seconds.
    """
    if stored + 1 < begun:
        return begun - stored - 1
    return min(0.0, ended - stored)


def _weights(request: NodeRequest) -> tuple[Status, str]:
    assert request.config is not None
    model = request.config.model
    problems = build_engine(model.engine, model.options).check()
    if problems:
        return Status.FAILED, "; ".join(problems)
    path = model.options.get("model_base", model.engine)
    return Status.OK, f"complete: {path}"


def describe(checks: list[Check]) -> Iterator[str]:
    """One line for each check."""
    for check in checks:
        yield f"{check.status.value:<8}{check.name:<12} {check.detail}"


def count_failed(checks: list[Check]) -> str:
    failed = sum(check.status is Status.FAILED for check in checks)
    warnings = sum(check.status is Status.WARNING for check in checks)
    return f"{plural(failed, 'check')} failed, {plural(warnings, 'warning')}"
