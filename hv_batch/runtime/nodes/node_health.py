"""Which nodes a run's actors keep off: a node that fails again and again must not have the night's samples (P5).

Only what speaks of the node counts: a worker that did not start there, and a device that faulted. A sample can kill a
process, so lost ranks and hangs stay with the samples and the slots. Stages are counted apart: a node has several
GPUs, and groups that render on seven of them say nothing of the eighth, under a decoder. Pure bookkeeping: nodes are
opaque names, and whether a run could do without some is asked of the caller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from hv_batch.job.stages import Stage

# Failures of one kind in a row, of whichever workers of a stage. One is bad luck: a port, a passing shortage of
# memory. Two must be enough: with a third, a sample that met a faulty GPU each time would have used up its tries
# (retries.infra: 3).
EXCLUDE_AFTER = 2


class NodeHealth:
    """What speaks against each node, and which of them are excluded for the rest of the run.

    `can_spare(nodes, stage)` tells whether the stage's workers could still be placed without all of `nodes`. A node
    is excluded only then: a run on its last nodes goes on trying, and ends by the budgets of its samples and slots.
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
        """Of every excluded node, the failure that was too much."""
        return dict(self._excluded)

    def start_failed(self, stage: Stage, nodes: Iterable[str], reason: str) -> list[str]:
        """A worker failed to start because of these nodes. Returns the nodes that should go but cannot be spared."""
        return self._count(self._failed_starts, stage, nodes, reason)

    def device_faulted(self, stage: Stage, nodes: Iterable[str], reason: str) -> list[str]:
        """A device of these nodes broke under a sample. Returns the nodes that should go but cannot be spared."""
        return self._count(self._faults, stage, nodes, reason)

    def started(self, stage: Stage, nodes: Iterable[str]) -> None:
        for node in nodes:
            del self._failed_starts[stage, node]

    def worked(self, stage: Stage, nodes: Iterable[str]) -> None:
        """A whole task: what a faulty device would not have got through."""
        for node in nodes:
            del self._faults[stage, node]

    def pardon(self) -> frozenset[str]:
        """Take every node back, because without them nothing can be placed any more; the nodes taken back."""
        pardoned = self.excluded
        self._excluded.clear()
        for failures in (self._failed_starts, self._faults):
            for stage, node in [known for known in failures if known[1] in pardoned]:
                del failures[stage, node]
        return pardoned

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
