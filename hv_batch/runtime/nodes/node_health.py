"""Counts the failures of nodes and decides which nodes a run excludes (P5).

Two kinds of failures count against a node: a worker that does not start there, and a device that faults. Lost ranks
and hangs do not count, because a sample can kill a process; they count against the sample and the slot. Each stage has
its own counts, because a node has several GPUs: groups that render on seven of them prove nothing about the eighth, on
which a decoder runs. This module does no I/O: nodes are opaque names, and a callback decides whether the run can do
without some of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from hv_batch.job.stages import Stage

# Consecutive failures of one kind, of any workers of a stage. One may be an accident: a port in use, a short lack of
# memory. A third would be too many, because a sample that met the faulty GPU each time would have used up its tries
# (retries.infra: 3).
EXCLUDE_AFTER = 2


class NodeHealth:
    """The failure counts of each node, and the nodes that are excluded for the rest of the run.

    `can_spare(nodes, stage)` returns whether the stage's workers could be placed without any of `nodes`. A node is
    excluded only if it returns True. Otherwise the run keeps trying there, until samples or slots run out of retries.
    """

    def __init__(self, can_spare: Callable[[frozenset[str], Stage], bool]) -> None:
        self._can_spare = can_spare
        self._failed_starts: Counter[tuple[Stage, str]] = Counter()
        self._faults: Counter[tuple[Stage, str]] = Counter()
        self._excluded: dict[str, str] = {}

    @property
    def excluded(self) -> frozenset[str]:
        return frozenset(self._excluded)

    @property
    def reasons(self) -> dict[str, str]:
        """The failure that excluded each node."""
        return dict(self._excluded)

    def start_failed(self, stage: Stage, nodes: Iterable[str], reason: str) -> list[str]:
        """Count a failed start against these nodes. Returns the nodes to exclude that the run cannot spare."""
        return self._count(self._failed_starts, stage, nodes, reason)

    def device_faulted(self, stage: Stage, nodes: Iterable[str], reason: str) -> list[str]:
        """Count a device fault against these nodes. Returns the nodes to exclude that the run cannot spare."""
        return self._count(self._faults, stage, nodes, reason)

    def started(self, stage: Stage, nodes: Iterable[str]) -> None:
        for node in nodes:
            del self._failed_starts[stage, node]

    def worked(self, stage: Stage, nodes: Iterable[str]) -> None:
        """A task succeeded on these nodes, so their devices work."""
        for node in nodes:
            del self._faults[stage, node]

    def readmit(self) -> frozenset[str]:
        """End all exclusions and reset the counts of these nodes. Returns the nodes."""
        readmitted = self.excluded
        self._excluded.clear()
        for failures in (self._failed_starts, self._faults):
            for stage, node in [counted for counted in failures if counted[1] in readmitted]:
                del failures[stage, node]
        return readmitted

    def _count(
        self, failures: Counter[tuple[Stage, str]], stage: Stage, nodes: Iterable[str], reason: str
    ) -> list[str]:
        needed = []
        for node in sorted(set(nodes) - self.excluded):
            failures[stage, node] += 1
            if failures[stage, node] < EXCLUDE_AFTER:
                continue
            if self._can_spare(self.excluded | {node}, stage):
                self._excluded[node] = reason
            else:
                needed.append(node)
        return needed
