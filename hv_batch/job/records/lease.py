"""The lease of an output root: an advisory `lease.json` that names the process that is writing to the root.

Two drivers on one root cannot corrupt it, because records are put if absent, but they would render every sample twice.
The lease prevents this. It describes its holder for operators, and it holds a heartbeat count, which the holder
increments every HEARTBEAT_S.

Object stores have no locks, and machines have no common clock, so timestamps are not compared. A process that finds a
lease determines the state of its holder as follows:

- If the holder is on the same machine, its process either exists or does not. This is known immediately, so a run that
  was killed can be restarted without waiting.
- If the holder is on another machine, its heartbeat count is watched. If it does not change for STALE_S, the holder has
  ended.
- If the lease is older than ANCIENT_S by the local clock, the holder has ended. No clock is wrong by that much.

A holder reads the lease before every heartbeat, and stops if it finds another token. If two processes replace a stale
lease at the same moment, both may hold it until the next heartbeat; the one whose token was overwritten then stops.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from hv_batch.job import layout
from hv_batch.job.documents.reading import InvalidObjectError, read
from hv_batch.job.documents.schema import LeaseDocument
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

logger = logging.getLogger(__name__)

LEASE_SCHEMA = "hv_batch/lease/1"

HEARTBEAT_S = 10.0  # two small requests each: 17,000 a day, a few cents on any object store
STALE_S = 60.0  # six heartbeats: a holder must survive a store that throttles it for half a minute
POLL_S = 2.0  # between two reads of another holder's lease: a running holder is recognised soon after its heartbeat
ANCIENT_S = 24 * 3600.0
RELEASE_S = 20.0  # for a heartbeat in progress, with its retries; a hanging store must not keep a command from ending


class LeaseHeldError(UserError):
    """Another process is writing to the output root."""


class LeaseLostError(UserError):
    """Another process has taken over the lease that this process held."""


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
    now = _now()
    return LeaseHolder(
        token=uuid.uuid4().hex,
        purpose=purpose,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process=_process_start(os.getpid()),
        job=job,
        since=now,
        beats=0,
        beat_at=now,
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


@contextlib.contextmanager
def hold_lease(
    store: Store,
    me: LeaseHolder,
    *,
    steal: bool = False,
    wait: Callable[[float], bool] | None = None,
) -> Iterator[Lease | None]:
    """Hold the lease for the duration of a `with` statement. A background thread sends the heartbeats.

    `wait` sleeps for a number of seconds and returns whether to stop waiting for another holder (`Event.wait`); if it
    stops, None is yielded. Raises LeaseHeldError if the current holder is running, unless `steal`, which replaces it.
    """
    pause = wait or threading.Event().wait
    if not _acquire(store, me, steal, pause):
        yield None
        return
    lease = Lease(store, me)
    try:
        yield lease
    finally:
        lease.release()


def _acquire(store: Store, me: LeaseHolder, take_over: bool, wait: Callable[[float], bool]) -> bool:
    """Write our lease if there is none or its holder has ended. Returns False if the wait was stopped."""
    while not store.put_new(layout.LEASE, _encode(me)):
        holder = read_lease(store)
        if holder is not None and holder.token == me.token:
            return True  # the acknowledgement of our own put was lost
        if holder is not None and not take_over:
            if is_gone(holder) is None and not _is_ancient(holder) and not _watch(store, holder, wait):
                return False
            if is_gone(holder) is False:
                raise _refusal(store, holder)
            current = read_lease(store)
            if current is not None and current.token != holder.token:
                continue  # another process has replaced the lease meanwhile
        store.put(layout.LEASE, _encode(me))
        break
    return True


def _watch(store: Store, holder: LeaseHolder, wait: Callable[[float], bool]) -> bool:
    """Watch the heartbeats of a holder on another machine.

    Returns True if it has ended and False if the wait was stopped. Raises LeaseHeldError if it is running.
    """
    logger.warning(
        f"{public_url(store.url)} is held by {holder.describe()}. Its process is not visible from this machine, so its "
        f"heartbeats are watched for at most {STALE_S:g} s (--take-over does not wait)"
    )
    watched = 0.0
    while watched < STALE_S:
        if wait(POLL_S):
            return False
        watched += POLL_S
        current = read_lease(store)
        if current is None or current.token != holder.token:
            return True
        if current.beats != holder.beats:
            raise _refusal(store, current)
    return True


def _refusal(store: Store, holder: LeaseHolder) -> LeaseHeldError:
    return LeaseHeldError(
        f"Another process is writing to {public_url(store.url)}: {holder.describe()}. Two processes would render every "
        "sample twice. Wait until it ends, or stop it. If it hangs, run this command with --take-over: the other "
        "process then stops at its next heartbeat."
    )


class Lease:
    """A lease that this process holds. `check` is cheap: it only reads the result of the last heartbeat."""

    def __init__(self, store: Store, me: LeaseHolder) -> None:
        self._store = store
        self._me = me
        self._new_holder: LeaseHolder | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LeaseLostError if a heartbeat has found another holder."""
        if self._new_holder is not None:
            raise LeaseLostError(
                f"{public_url(self._store.url)} was taken over by {self._new_holder.describe()}, so this run has "
                "stopped. Its committed samples are kept, and the other process continues from there."
            )

    def heartbeat(self) -> None:
        """Send one heartbeat. A lease that was deleted is written again."""
        holder = read_lease(self._store)
        if holder is not None and holder.token != self._me.token:
            self._new_holder = holder
            return
        self._me = replace(self._me, beats=self._me.beats + 1, beat_at=_now())
        self._store.put(layout.LEASE, _encode(self._me))

    def release(self) -> None:
        self._released.set()
        self._thread.join(RELEASE_S)
        # If the store is unreachable, the lease stays and becomes stale.
        with contextlib.suppress(OSError):
            holder = read_lease(self._store)
            if holder is not None and holder.token == self._me.token:
                self._store.delete(layout.LEASE)

    def _send_heartbeats(self) -> None:
        while self._new_holder is None and not self._released.wait(HEARTBEAT_S):
            # Errors are ignored: without heartbeats, other processes would consider this holder ended. If the store is
            # unreachable, they cannot read the lease either, and the run handles the outage itself.
            with contextlib.suppress(Exception):
                self.heartbeat()


def _encode(holder: LeaseHolder) -> bytes:
    return encode({"schema": LEASE_SCHEMA, **asdict(holder)})


def _is_ancient(holder: LeaseHolder) -> bool:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(holder.beat_at)).total_seconds() > ANCIENT_S
    except (ValueError, TypeError):
        return False


def _now() -> str:
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
