"""Which nodes denoise groups keep off: a node that fails again and again must not have the night's samples (P5).

Only what speaks of the node counts: a group that did not start there, and a device that faulted. A sample can kill a
process, so lost ranks and hangs stay with the samples and the slots. Pure bookkeeping: nodes are opaque names, and
whether a group could still stand somewhere is asked of the caller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

# Failures of one kind in a row, of whichever groups. One is bad luck: a port, a passing shortage of memory. Two must be
# enough: with a third, a sample that met a faulty GPU each time would have used up its tries (retries.infra: 3).
EXCLUDE_AFTER = 2


class NodeHealth:
    """What speaks against each node, and which of them are excluded for the rest of the run.

    `can_spare(nodes)` tells whether a group could still be placed without all of `nodes`. A node is excluded only then:
    a run on its last nodes goes on trying, and ends by the budgets of its samples and slots.
    """

    def __init__(self, can_spare: Callable[[frozenset[str]], bool]) -> None:
        self._can_spare = can_spare
        self._failed_starts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._excluded: dict[str, str] = {}

    @property
    def excluded(self) -> frozenset[str]:
        return frozenset(self._excluded)

    @property
    def reasons(self) -> dict[str, str]:
        """Of every excluded node, the failure that was too much."""
        return dict(self._excluded)

    def start_failed(self, nodes: Iterable[str], reason: str) -> list[str]:
        """A group failed to start because of these nodes. Returns the nodes that should go but cannot be spared."""
        return self._count(self._failed_starts, nodes, reason)

    def device_faulted(self, nodes: Iterable[str], reason: str) -> list[str]:
        """A device of these nodes broke under a sample. Returns the nodes that should go but cannot be spared."""
        return self._count(self._faults, nodes, reason)

    def started(self, nodes: Iterable[str]) -> None:
        for node in nodes:
            del self._failed_starts[node]

    def rendered(self, nodes: Iterable[str]) -> None:
        """A whole sample: what a faulty device would not have got through."""
        for node in nodes:
            del self._faults[node]

    def pardon(self) -> frozenset[str]:
        """Take every node back, because without them nothing can be placed any more; the nodes taken back."""
        pardoned = self.excluded
        self._excluded.clear()
        for node in pardoned:
            del self._failed_starts[node], self._faults[node]
        return pardoned

    def _count(self, failures: Counter[str], nodes: Iterable[str], reason: str) -> list[str]:
        needed = []
        for node in sorted(set(nodes) - self.excluded):
            failures[node] += 1
            if failures[node] < EXCLUDE_AFTER:
                continue
            if self._can_spare(self.excluded | {node}):
                self._excluded[node] = reason
            else:
                needed.append(node)
        return needed
