"""Who is writing to an output root: one advisory `lease.json`, so that a second driver learns of the first.

Two drivers on one root corrupt nothing, because records are put if absent; they pay for every sample twice. The lease
keeps them apart. It holds what an operator wants to know of the holder and a count of its heartbeats, which the holder
raises every HEARTBEAT_S for as long as it lives.

Object stores have no locks and machines have no common clock, so nobody compares times. Whoever finds a lease judges
its holder by what can be seen from here:

- on the same machine its process is there, or it is not: both are known at once, so the same command after a SIGKILL
  goes on without a pause;
- on another machine the count rises while we watch, or it does not for STALE_S, and then nobody is there;
- only a lease that is older than ANCIENT_S by our clock is given up without watching: no clock is that wrong.

A holder reads the lease before every beat. Finding another token there it knows that it was replaced and stops. Two
that replace a stale lease at the same moment may both believe for one beat that they hold it; the one whose token was
overwritten finds out at its next.
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
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.canonical_json import decode, encode
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

logger = logging.getLogger(__name__)

LEASE_SCHEMA = "hv_batch/lease/1"

HEARTBEAT_S = 10.0  # two small requests each: 17,000 a day, a few cents on any object store
STALE_S = 60.0  # six beats: a holder whose store throttles it for half a minute is still alive
LOOK_S = 2.0  # between two looks at somebody else's lease: a living one is recognised soon after its next beat
ANCIENT_S = 24 * 3600.0
RELEASE_S = 20.0  # for a beat under way, with its retries; a store that hangs must not keep a command from ending


class LeaseHeldError(UserError):
    """Somebody else is writing to the output root."""


class LeaseLostError(UserError):
    """The lease that this process held is another's now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseHolder:
    """One `lease.json`. `machine` and `process` tell whether `pid` means anything here; None where that is unknown."""

    token: str
    purpose: str  # the command: run, retry, verify, gc
    host: str
    machine: str | None
    pid: int
    process: str | None  # when the process began, in the kernel's own count: process ids come round again
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
    """This process as a holder, with a token of its own."""
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
    """Who holds the output root, dead or alive; None when nobody does, or the file is not a lease."""
    try:
        values = decode(store.get(layout.LEASE))
    except (FileNotFoundError, ValueError):
        return None
    try:
        return LeaseHolder(**{name: values[name] for name in LeaseHolder.__dataclass_fields__})
    except (KeyError, TypeError):
        return None


def is_gone(holder: LeaseHolder) -> bool | None:
    """Whether the holder's process has ended; None when it cannot be seen from here."""
    if holder.machine is None or holder.process is None or holder.machine != _machine():
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, who may have hidden it from /proc
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
    """Hold the lease for the length of a `with`; heartbeats come from a thread of its own.

    `wait` sleeps so many seconds and returns whether to stop waiting for another holder (an `Event.wait`); then None is
    yielded. Raises LeaseHeldError when a living holder is there; `steal` replaces it.
    """
    pause = wait or threading.Event().wait
    if not _take(store, me, steal, pause):
        yield None
        return
    lease = Lease(store, me)
    try:
        yield lease
    finally:
        lease.release()


def _take(store: Store, me: LeaseHolder, steal: bool, wait: Callable[[float], bool]) -> bool:
    """Put our lease where none is, or in the place of one whose holder is gone; False when the wait was given up."""
    while not store.put_new(layout.LEASE, _encode(me)):
        found = read_lease(store)
        if found is not None and found.token == me.token:
            return True  # the answer to our own put was lost
        if found is not None and not steal:
            if is_gone(found) is None and not _is_ancient(found) and not _watch(store, found, wait):
                return False
            if is_gone(found) is False:
                raise _refusal(store, found)
            current = read_lease(store)
            if current is not None and current.token != found.token:
                continue  # somebody was faster; judge them
        store.put(layout.LEASE, _encode(me))
        break
    return True


def _watch(store: Store, found: LeaseHolder, wait: Callable[[float], bool]) -> bool:
    """Look on until the holder is known to be dead (True), or told to stop waiting (False); raises when it is alive."""
    logger.warning(
        f"{public_url(store.url)} is held by {found.describe()}. Its process cannot be seen from here: watching for at "
        f"most {STALE_S:g} s whether it still beats (--steal does not wait)"
    )
    watched = 0.0
    while watched < STALE_S:
        if wait(LOOK_S):
            return False
        watched += LOOK_S
        current = read_lease(store)
        if current is None or current.token != found.token:
            return True
        if current.beats != found.beats:
            raise _refusal(store, current)
    return True


def _refusal(store: Store, holder: LeaseHolder) -> LeaseHeldError:
    return LeaseHeldError(
        f"Somebody is writing to {public_url(store.url)}: {holder.describe()}. Two at once would render everything "
        "twice. Wait for it to end, or stop it; if you know that it hangs, run this command with --steal, which makes "
        "it stop at its next heartbeat."
    )


class Lease:
    """The lease while it is held. `check` as often as you like: it only looks at what the last heartbeat found."""

    def __init__(self, store: Store, me: LeaseHolder) -> None:
        self._store = store
        self._me = me
        self._thief: LeaseHolder | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LeaseLostError once another holder has been seen."""
        if self._thief is not None:
            raise LeaseLostError(
                f"{public_url(self._store.url)} was taken over by {self._thief.describe()}, so this run has stopped. "
                "What is committed stays, and the other one goes on from there."
            )

    def beat(self) -> None:
        """One heartbeat. A lease that somebody deleted is put back."""
        found = read_lease(self._store)
        if found is not None and found.token != self._me.token:
            self._thief = found
            return
        self._me = replace(self._me, beats=self._me.beats + 1, beat_at=_now())
        self._store.put(layout.LEASE, _encode(self._me))

    def release(self) -> None:
        self._released.set()
        self._thread.join(RELEASE_S)
        # Where the store does not answer the lease stays, and is found stale.
        with contextlib.suppress(OSError):
            found = read_lease(self._store)
            if found is not None and found.token == self._me.token:
                self._store.delete(layout.LEASE)

    def _beat_on(self) -> None:
        while self._thief is None and not self._released.wait(HEARTBEAT_S):
            # While the store is away nobody else can see the lease either, and the run has its own patience with it;
            # whatever the error was, a holder that stops beating would be taken for dead.
            with contextlib.suppress(Exception):
                self.beat()


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
    """This boot of this machine and this space of process ids: two containers on one host do not see each other's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:16]
    except OSError:  # not Linux
        return None


def _process_start(pid: int) -> str | None:
    """When a process began, as the kernel counts; None when there is no such process, or it is dead and not reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if state in "ZX" else rest[18]
