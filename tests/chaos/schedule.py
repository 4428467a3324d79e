"""Seeded schedules of what goes wrong during a run. Equal arguments give an equal schedule."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# Kinds of events by what they need, with their weight among all kinds.
PROCESSES = {
    "kill-rank": 6,
    "stop-rank": 3,  # SIGSTOP: the process hangs, and its connections stay open
    "kill-encoder": 3,
    "stop-encoder": 2,
    "kill-decoder": 4,
    "stop-decoder": 3,
    "limit-rank": 2,  # it gets no more memory, for a while
    "limit-encoder": 1,
    "limit-decoder": 2,
    "pause-rank": 2,  # SIGSTOP, then SIGCONT before anybody notices
    "kill-driver": 5,
    "stop-driver": 2,  # SIGSTOP; the same command with --take-over; then SIGCONT
    "pause-driver": 2,
    "end-driver": 3,  # SIGTERM: a drain
    "second-driver": 2,
    "take-over": 2,  # from a driver that works
    "kill-raylet": 2,  # its workers have to notice
    "pause-raylet": 1,  # long enough that Ray declares the node dead
    "operate": 4,  # another command on the root of the run, which is killed in one of two cases
    "kill-head": 1,  # the same command continues on another cluster, while the machines of the dead one still work
    "power-off": 3,  # the node with all its processes and its disk
    "drain-node": 2,  # with a deadline, at which the node goes away
    "drain-node-without-deadline": 1,
    "break-ffmpeg": 3,  # on one node, for a while
    "fill-node": 3,  # no room for temporary files and the spool of a node
    "break-device": 2,
    "clock-jump": 3,  # of the driver's machine, for a while
}
OBJECT_STORE = {
    "s3-503": 3,
    "s3-expired": 2,
    "s3-skewed": 2,
    "s3-hang": 2,
    "s3-torn": 3,
    "s3-unacknowledged": 3,
    "s3-forgotten": 4,
    "s3-stale": 3,
    "s3-slow": 2,
    "s3-down": 2,
    "lose-media": 2,  # an object disappears after its commit
}
DISK = {"disk-full": 4, "lose-media": 1}

BY_ROOT = {"s3": PROCESSES | OBJECT_STORE, "disk": PROCESSES | DISK}

# What a store can be made to forget, as parts of paths: each kind of object that a run writes.
FORGETTABLE = ("/data/", "/commits/", "/latents/", "/steps/", "/lineage/", "/report/", "lease.json", "metadata.parquet")
FORGETTABLE += ("/events/", "summary.json", "_SUCCESS", "README.md", "/posters/")


@dataclass(frozen=True, slots=True)
class Event:
    kind: str
    wait_s: float  # after the event before it
    lasts_s: float  # if it is a state
    draw: float  # 0 to 1: which of the possible targets

    def pick(self, targets: Sequence):
        return targets[int(self.draw * len(targets))]

    def __str__(self) -> str:
        return f"+{self.wait_s:.1f} s {self.kind} ({self.draw:.3f}, {self.lasts_s:.1f} s)"


def make_schedule(
    seed: int, root: str, events: int, *, wait_s: float = 4.0, kinds: Collection[str] = ()
) -> tuple[Event, ...]:
    """`events` events for a root of a kind ("s3" or "disk"), `wait_s` seconds apart on average; only those of `kinds`,
    if any are given.
    """
    drawn = random.Random(f"{seed} {root} {events}")
    weights = {kind: weight for kind, weight in BY_ROOT[root].items() if not kinds or kind in kinds}
    return tuple(
        Event(
            drawn.choices(list(weights), list(weights.values()))[0],
            drawn.uniform(0.0, 2.0 * wait_s),
            drawn.choice((1.0, 3.0, 8.0)),
            drawn.random(),
        )
        for _ in range(events)
    )
