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

Two processes must not act at the same time, so both sides keep to the same time:

- A holder that could not send a heartbeat for STALE_S must not act. A command stops itself. A run goes on for the time
  that it bears an outage, because its workers compare the lease before each write (`refuse_other_holder`).
- A process that takes the lease over acts only if the former holder is known to have ended, or has not overwritten the
  new lease for STALE_S. If it is still not known to have ended, the lease stays after the release, so that the former
  holder finds it whenever it reaches the store again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from hv_batch.job import layout
from hv_batch.job.records.lease_holder import LeaseHolder, encode_holder, is_ancient, is_gone, now, read_lease
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0  # two small requests each: 17,000 a day, a few cents on any object store
STALE_S = 60.0  # six heartbeats: a holder must survive a store that throttles it for half a minute
SUSPENDED_S = 2 * STALE_S  # longer than a heartbeat takes to fail, with its retries
POLL_S = 2.0  # between two reads of another holder's lease: a running holder is recognised soon after its heartbeat
RELEASE_S = 5.0  # for the removal of the lease; a hanging store must not keep a command from ending


class LeaseHeldError(UserError):
    """Another process is writing to the output root."""


class LeaseLostError(UserError):
    """Another process has taken over the lease that this process held."""


@contextlib.contextmanager
def hold_lease(
    store: Store,
    me: LeaseHolder,
    *,
    steal: bool = False,
    wait: Callable[[float], bool] | None = None,
    silence_s: float | None = None,
) -> Iterator[Lease | None]:
    """Hold the lease for the duration of a `with` statement. A background thread sends the heartbeats.

    `wait` sleeps for a number of seconds and returns whether to stop waiting for another holder (`Event.wait`); if it
    stops, None is yielded. Raises LeaseHeldError if the current holder is running, unless `steal`, which replaces it
    and waits until it has stopped. `Lease.check` raises if no heartbeat has succeeded for `silence_s`, by default
    STALE_S.
    """
    pause = wait or threading.Event().wait
    acquired = _acquire(store, me, steal, pause)
    former = acquired if isinstance(acquired, LeaseHolder) else None
    if acquired is False or (former and not _await_end(store, me, former, pause)):
        yield None
        return
    lease = Lease(
        store,
        me,
        silence_s=STALE_S if silence_s is None else silence_s,
        stays=former is not None and is_gone(former) is not True,
    )
    try:
        yield lease
    finally:
        lease.release()


def refuse_other_holder(store: Store, token: str) -> None:
    """Raises LeaseLostError if another process than that with `token` holds the lease.

    Workers call this before they write: they may reach the store while the process that holds the lease does not.
    """
    holder = read_lease(store)
    if holder is not None and holder.token != token:
        raise _loss(store, holder)


def _acquire(store: Store, me: LeaseHolder, take_over: bool, wait: Callable[[float], bool]) -> bool | LeaseHolder:
    """Write our lease if there is none, its holder has ended, or `take_over`.

    Returns False if the wait was stopped, and the former holder if it may still be running.
    """
    while not store.put_new(layout.LEASE, encode_holder(me)):
        holder = read_lease(store)
        if holder is not None and holder.token == me.token:
            return True  # the acknowledgement of our own put was lost
        if holder is not None and not take_over:
            if is_gone(holder) is None and not is_ancient(holder) and not _watch(store, holder, wait):
                return False
            if is_gone(holder) is False:
                raise _refusal(store, holder)
            current = read_lease(store)
            if current is not None and current.token != holder.token:
                continue  # another process has replaced the lease meanwhile
        store.put(layout.LEASE, encode_holder(me))
        may_run = holder is not None and take_over and not is_gone(holder) and not is_ancient(holder)
        return holder if holder is not None and may_run else True
    return True


def _await_end(store: Store, me: LeaseHolder, former: LeaseHolder, wait: Callable[[float], bool]) -> bool:
    """Wait until the holder that we have replaced has stopped: it is gone, or silent for STALE_S.

    Returns False if the wait was stopped. Raises LeaseHeldError if a third process has taken the lease.
    """
    logger.warning(
        f"{public_url(store.url)} is taken over from {former.describe()}. Nothing is changed before that process has "
        f"ended, or has been silent for {STALE_S:g} s"
    )
    silent_s, beats = 0.0, 0
    while silent_s < STALE_S and is_gone(former) is not True:
        if wait(POLL_S):
            with contextlib.suppress(OSError):
                store.delete(layout.LEASE)
            return False
        silent_s += POLL_S
        current = read_lease(store)
        if current is not None and current.token not in (me.token, former.token):
            raise _refusal(store, current)
        if current is not None and current.token == former.token:
            silent_s = 0.0  # a heartbeat that had begun before has overwritten our lease
        beats += 1
        store.put(layout.LEASE, encode_holder(replace(me, beats=beats, beat_at=now())))  # others may be watching ours
    return True


def _watch(store: Store, holder: LeaseHolder, wait: Callable[[float], bool]) -> bool:
    """Watch the heartbeats of a holder on another machine.

    Returns True if it has ended and False if the wait was stopped. Raises LeaseHeldError if it is running.
    """
    logger.warning(
        f"{public_url(store.url)} is held by {holder.describe()}. Its process is not visible from this machine, so its "
        f"heartbeats are watched for at most {STALE_S:g} s"
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
        "process then stops at its next heartbeat, and this command waits for that."
    )


def _loss(store: Store, holder: LeaseHolder) -> LeaseLostError:
    return LeaseLostError(
        f"{public_url(store.url)} was taken over by {holder.describe()}, so this run has stopped. Its committed "
        "samples are kept, and the other process continues from there."
    )


class Lease:
    """A lease that this process holds. `check` is cheap: it only reads the result of the last heartbeat."""

    def __init__(self, store: Store, me: LeaseHolder, *, silence_s: float = math.inf, stays: bool = False) -> None:
        """`silence_s` is for how long heartbeats may fail; with `stays` the lease is not removed by `release`."""
        self._store = store
        self._me = me
        self._silence_s = silence_s
        self._stays = stays
        self._new_holder: LeaseHolder | None = None
        self._tried_at = self._renewed_at = _seconds()
        self._released = threading.Event()
        self._beating = threading.Lock()
        self._thread = threading.Thread(target=self._send_heartbeats, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LeaseLostError if a heartbeat has found another holder, or if none has succeeded for too long."""
        if _seconds() - self._tried_at > SUSPENDED_S:  # this process was suspended: another one may have taken over
            with contextlib.suppress(OSError):
                self.heartbeat()
        if self._new_holder is not None:
            raise _loss(self._store, self._new_holder)
        if (silent_s := _seconds() - self._renewed_at) > self._silence_s:
            raise LeaseLostError(
                f"{public_url(self._store.url)} has not accepted a heartbeat of this process for {silent_s:.0f} s, and "
                "another process may have taken it over, so this process has stopped. What is committed stays. Run the "
                "same command again once the output root answers."
            )

    def heartbeat(self) -> None:
        """Send one heartbeat. A lease that was deleted is written again."""
        with self._beating:
            try:
                holder = read_lease(self._store)
                if holder is not None and holder.token != self._me.token:
                    self._new_holder = holder
                    return
                self._me = replace(self._me, beats=self._me.beats + 1, beat_at=now())
                self._store.put(layout.LEASE, encode_holder(self._me))
                self._renewed_at = _seconds()
            finally:
                self._tried_at = _seconds()

    def release(self) -> None:
        """End the heartbeats and remove the lease. If the store does not answer, the lease stays and becomes stale."""
        self._released.set()
        self._thread.join(RELEASE_S)

    def _send_heartbeats(self) -> None:
        pause_s = HEARTBEAT_S
        while self._new_holder is None and not self._released.wait(pause_s):
            # The caller of `check` decides how long this may fail. Another holder should be found as soon as the store
            # answers again.
            pause_s = min(POLL_S, HEARTBEAT_S)
            with contextlib.suppress(Exception):
                self.heartbeat()
                pause_s = HEARTBEAT_S
        if self._released.wait() and not self._stays:
            with contextlib.suppress(OSError):
                holder = read_lease(self._store)
                if holder is not None and holder.token == self._me.token:
                    self._store.delete(layout.LEASE)


def _seconds() -> float:
    """A clock that also runs while the machine is suspended, if there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
