"""What the denoise groups of a run share: the seats that wait for a rebuild, and one voice.

A group asks here for its seats. Who is waiting for what is said for all groups together, because on a cluster that is
too small for `groups.count` the operator needs one sentence and not one a group.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import count

import ray

from hv_batch.job.config import RunConfig
from hv_batch.job.events import Stage, WorkerId
from hv_batch.runtime.placement import SAY_EVERY_S, alive_nodes, fits, group_bundles, show_apart, show_hardware, total
from hv_batch.runtime.seats import Room, Seats
from hv_batch.runtime.sick_nodes import SickNodes

# Ray places a group on idle nodes within a second; a sentence about each would be noise.
FIRST_WORD_S = 5.0

# Seats that no group will come for, as things stand, are kept a little longer: a retry at the end of a run first waits
# for an encoder that had been let go, which Ray places within seconds where there is room.
KEEP_S = 10.0


class GroupPool:
    """One for all groups of a run."""

    def __init__(self, config: RunConfig, sick_nodes: SickNodes, say: Callable[[str], None]) -> None:
        self._config = config
        self._sick_nodes = sick_nodes
        self._say = say
        self._bundles = group_bundles(config)
        self._kept: list[tuple[float, Seats]] = []  # since when
        self._occupied: list[Seats] = []
        self._serial = count()
        self._waiting: dict[WorkerId, float] = {}  # since when
        self._placed: set[WorkerId] = set()
        self._said: tuple[float, str] = (-math.inf, "")  # when, what

    # Seats ------------------------------------------------------------------------------------------------------------

    def seats(self, worker: WorkerId) -> Seats:
        """Kept ones where they are still good, else new ones."""
        while self._kept:
            _, kept = self._kept.pop(0)
            if self.good(kept) and kept.answer():
                return kept
            kept.release()
        name = f"hv-group-{worker.slot}-{next(self._serial)}"
        return Seats(self._config, name, self._sick_nodes.avoided(Stage.DENOISE))

    def good(self, seats: Seats) -> bool:
        """Whether a group may be built there: no node is lost, and none has been excluded since they were asked for."""
        nodes, excluded = seats.nodes(), self._sick_nodes.excluded
        fit = excluded.isdisjoint(nodes) if nodes else seats.avoid == excluded
        return fit and seats.sound(alive_nodes())

    def worth_keeping(self, pending: Seats) -> bool:
        """Whether to go on waiting for these, or to ask anew: another group's may have become free meanwhile."""
        return not self._kept and self.good(pending)

    def keep(self, seats: Seats) -> None:
        """For the next group that is built, of whichever slot: bound to its own, they could wait for it for ever."""
        self._kept.append((time.monotonic(), seats))

    def give_back(self, groups_to_come: int, now: float) -> None:
        """Let go of seats that nobody will come for: others may wait for exactly these GPUs."""
        while len(self._kept) > groups_to_come + len(self._waiting) and now - self._kept[0][0] > KEEP_S:
            self._kept.pop(0)[1].release()

    def occupy(self, seats: Seats) -> None:
        """All ranks of a group sit there."""
        seats.used = seats.occupied = True
        self._occupied.append(seats)

    def vacate(self, seats: Seats) -> None:
        """The ranks are gone, if they had ever sat there."""
        seats.occupied = False
        if seats in self._occupied:
            self._occupied.remove(seats)

    def find_room(self, stage: Stage) -> Room | None:
        """Where fewest lodgers live already."""
        rooms = (seats.find_room(stage) for seats in sorted(self._occupied, key=lambda seats: seats.lodgers))
        return next((room for room in rooms if room), None)

    def close(self) -> None:
        while self._kept:
            self._kept.pop()[1].release()

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
        usable = [resources for node, resources in nodes.items() if node not in self._sick_nodes.excluded]
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
