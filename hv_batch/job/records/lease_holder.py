"""Who holds an output root: the contents of `lease.json`, and whether its process is running."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from hv_batch.job import layout
from hv_batch.job.documents.reading import InvalidObjectError, read
from hv_batch.job.documents.schema import LeaseDocument
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store

LEASE_SCHEMA = "hv_batch/lease/1"

ANCIENT_S = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseHolder:
    """The contents of `lease.json`.

    `machine` and `process` identify the process behind `pid`; both are None if they are unknown (not Linux).
    """

    token: str
    purpose: str  # the command: run, retry, verify, gc
    host: str
    machine: str | None
    pid: int
    process: str | None  # start time of the process in kernel ticks, because process ids are reused
    job: str | None  # of `ray job submit`
    since: str
    beats: int
    beat_at: str

    def describe(self) -> str:
        job = f", Ray job {self.job}" if self.job else ""
        return (
            f"`hv-batch {self.purpose}` on {self.host}, process {self.pid}{job}, since {self.since}, last heartbeat "
            f"{self.beat_at}"
        )


def this_process(purpose: str, job: str | None = None) -> LeaseHolder:
    """A LeaseHolder for this process, with a new token."""
    begun = now()
    return LeaseHolder(
        token=uuid.uuid4().hex,
        purpose=purpose,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process=_process_start(os.getpid()),
        job=job,
        since=begun,
        beats=0,
        beat_at=begun,
    )


def read_lease(store: Store) -> LeaseHolder | None:
    """The holder in `lease.json`, running or not; None if there is no lease, or the file is not one."""
    try:
        values = read(store, layout.LEASE, LeaseDocument)
    except (FileNotFoundError, InvalidObjectError):
        return None
    return LeaseHolder(**{name: values[name] for name in LeaseHolder.__dataclass_fields__})


def is_gone(holder: LeaseHolder) -> bool | None:
    """Whether the holder's process has ended; None if it is on another machine, so this is unknown."""
    if holder.machine is None or holder.process is None or holder.machine != _machine():
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # a process of another user, which may be hidden in /proc
        return _process_start(holder.pid) not in (None, holder.process)
    return _process_start(holder.pid) != holder.process


def encode_holder(holder: LeaseHolder) -> bytes:
    return encode({"schema": LEASE_SCHEMA, **asdict(holder)})


def is_ancient(holder: LeaseHolder) -> bool:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(holder.beat_at)).total_seconds() > ANCIENT_S
    except (ValueError, TypeError):
        return False


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _machine() -> str | None:
    """Identifies this boot of this machine and this PID namespace: containers on one host have separate process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:16]
    except OSError:  # not Linux
        return None


def _process_start(pid: int) -> str | None:
    """The start time of a process in kernel ticks; None if it does not exist or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the process name before it may contain spaces and parentheses
    return None if state in "ZX" else rest[18]
