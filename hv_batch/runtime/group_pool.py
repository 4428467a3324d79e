"""What the denoise groups of a run share: the seats that wait for a rebuild, the nodes to keep off, and one voice.

A group asks here for its seats and tells here what happened to it. What is decided (which node is excluded) is the
pure layer's; who is waiting for what is said for all groups together, because on a cluster that is too small for
`groups.count` the operator needs one sentence and not one a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import count

import ray

from hv_batch.job.config import RunConfig
from hv_batch.job.events import WorkerId
from hv_batch.job.nodes import NodeHealth
from hv_batch.runtime.placement import SAY_EVERY_S, alive_nodes, fits, group_bundles, show_apart, show_hardware, total
from hv_batch.runtime.seats import Seats

# Ray places a group on idle nodes within a second; a sentence about each would be noise.
FIRST_WORD_S = 5.0


class GroupPool:
    """One for all groups of a run."""

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._bundles = group_bundles(config)
        self._health = NodeHealth(self._can_spare)
        self._kept: list[Seats] = []
        self._serial = count()
        self._waiting: dict[WorkerId, float] = {}  # since when
        self._placed: set[WorkerId] = set()
        self._said: tuple[float, str] = (-math.inf, "")  # when, what
        self._names: dict[str, str] = {}  # of nodes that were blamed, which may be gone when they are told of

    # Seats ------------------------------------------------------------------------------------------------------------

    def seats(self, worker: WorkerId) -> Seats:
        """Kept ones where they are still good, else new ones."""
        while self._kept:
            kept = self._kept.pop(0)
            if self.good(kept):
                return kept
            kept.release()
        if self._health.excluded and not self._can_spare(self._health.excluded):
            pardoned = ", ".join(self._name(node) for node in sorted(self._health.pardon()))
            self._say(f"nothing else could host a group any more, so {pardoned} may be used again")
        return Seats(self._config, f"hv-group-{worker.slot}-{next(self._serial)}", self._health.excluded)

    def good(self, seats: Seats) -> bool:
        """Whether a group may be built there: no node is lost, and none has been excluded since they were asked for."""
        nodes, excluded = seats.nodes(), self._health.excluded
        fit = excluded.isdisjoint(nodes) if nodes else seats.avoid == excluded
        return fit and seats.sound(alive_nodes())

    def worth_keeping(self, pending: Seats) -> bool:
        """Whether to go on waiting for these, or to ask anew: another group's may have become free meanwhile."""
        return not self._kept and self.good(pending)

    def keep(self, seats: Seats) -> None:
        """For the next group that is built, of whichever slot: bound to its own, they could wait for it for ever."""
        self._kept.append(seats)

    def close(self) -> None:
        while self._kept:
            self._kept.pop().release()

    def _can_spare(self, nodes: frozenset[str]) -> bool:
        rest = [resources for node, resources in alive_nodes().items() if node not in nodes]
        return fits([self._bundles], rest)

    # News -------------------------------------------------------------------------------------------------------------

    def start_failed(self, nodes: Iterable[str], reason: str) -> None:
        self._tell(self._health.start_failed, nodes, f"groups do not start there: {_first_line(reason)}")

    def device_faulted(self, nodes: Iterable[str], reason: str) -> None:
        self._tell(self._health.device_faulted, nodes, f"its device fails: {_first_line(reason)}")

    def started(self, nodes: Iterable[str]) -> None:
        self._health.started(nodes)

    def rendered(self, nodes: Iterable[str]) -> None:
        self._health.rendered(nodes)

    def excluded(self) -> dict[str, str]:
        """The nodes that get no group any more, as people know them, each with the reason."""
        return {self._name(node): reason for node, reason in self._health.reasons.items()}

    def _tell(self, count_failure: Callable[[Iterable[str], str], list[str]], nodes: Iterable[str], why: str) -> None:
        before = self._health.excluded
        for node in count_failure(nodes, why):
            self._say(f"{self._name(node)} fails again and again, but no other node could host a group: it stays")
        for node in sorted(self._health.excluded - before):
            self._say(f"{self._name(node)} is excluded for the rest of this run: {why}")

    def _name(self, node: str) -> str:
        """The node's address and the beginning of Ray's id: one address may have several nodes."""
        if node not in self._names:
            addresses = {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes()}
            self._names[node] = f"node {addresses.get(node, 'unknown')} ({node[:8]})"
        return self._names[node]

    # Waiting ----------------------------------------------------------------------------------------------------------

    def waits(self, worker: WorkerId, now: float) -> None:
        """Called again and again while a group has no seats; says what all of them wait for, when there is news."""
        if now - self._waiting.setdefault(worker, now) < FIRST_WORD_S or now - self._said[0] < SAY_EVERY_S:
            return
        text = self._why_waiting()
        if text != self._said[1]:
            self._say(text)
        self._said = (now, text)

    def placed(self, worker: WorkerId) -> None:
        self._waiting.pop(worker, None)
        self._placed.add(worker)

    def ended(self, worker: WorkerId) -> None:
        self._waiting.pop(worker, None)
        self._placed.discard(worker)

    def _why_waiting(self) -> str:
        nodes = alive_nodes()
        usable = [resources for node, resources in nodes.items() if node not in self._health.excluded]
        there, free = show_hardware(total(list(nodes.values()))), show_hardware(ray.available_resources())
        if fits([self._bundles], usable):
            hope = "They begin when others let go of enough, or when nodes join."
        else:
            hope = "The nodes here could never hold one, however idle: they begin only when others join."
        return (
            f"{len(self._placed)} denoise group(s) have their place, {len(self._waiting)} wait for nodes. Each asks "
            f"for {show_apart(self._bundles)}; the cluster has {there} on {len(nodes)} node(s), of which {free} are "
            f"free. {hope}"
        )


def _first_line(reason: str) -> str:
    return reason.strip().partition("\n")[0]
