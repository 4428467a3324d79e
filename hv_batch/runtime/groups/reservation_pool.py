"""What the denoise groups of a run share: the seats that wait for a rebuild, and one voice.

A group asks here for its seats. Who is waiting for what is said for all groups together, because on a cluster that is
too small for `groups.count` the operator needs one sentence and not one a group.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from itertools import count

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan
from hv_batch.runtime.groups.reservation import BundleSlot, GroupReservation
from hv_batch.runtime.nodes.exclusion import NodeExclusion
from hv_batch.runtime.nodes.resources import (
    SAY_EVERY_S,
    alive_nodes,
    can_place,
    format_bundles,
    group_bundles,
    show_cluster,
)

logger = logging.getLogger(__name__)

# Ray places a group on idle nodes within a second; a sentence about each would be noise.
FIRST_WORD_S = 5.0

# Seats that no group will come for, as things stand, are kept a little longer: a retry at the end of a run first waits
# for an encoder that had been let go, which Ray places within seconds where there is room.
KEEP_S = 10.0


class ReservationPool:
    """One for all groups of a run."""

    def __init__(self, run: ResolvedRun, exclusion: NodeExclusion) -> None:
        self._run = run
        self._exclusion = exclusion
        self._kept: list[tuple[float, GroupReservation]] = []  # since when
        self._occupied: list[GroupReservation] = []
        self._serial = count()
        self._waiting: dict[WorkerId, tuple[float, GroupReservation]] = {}  # since when, for what
        self._placed: set[WorkerId] = set()
        self._said: tuple[float, str] = (-math.inf, "")  # when, what

    # Seats ------------------------------------------------------------------------------------------------------------

    def reservation(self, worker: WorkerId, plan: ParallelPlan) -> GroupReservation:
        """Kept ones of that size where they are still good, else new ones."""
        for since, kept in self._kept_for(plan):
            self._kept.remove((since, kept))
            if self.good(kept) and kept.answer():
                return kept
            kept.release()
        name = f"hv-group-{worker.slot}-{next(self._serial)}"
        return GroupReservation(self._run, plan, name, self._exclusion.avoided(Stage.DENOISE))

    def good(self, reservation: GroupReservation) -> bool:
        """Whether a group may be built there: no node is lost, and none has been excluded since they were asked for."""
        nodes, excluded = reservation.nodes(), self._exclusion.excluded
        fit = excluded.isdisjoint(nodes) if nodes else reservation.avoid == excluded
        return fit and reservation.sound(alive_nodes())

    def worth_keeping(self, pending: GroupReservation) -> bool:
        """Whether to go on waiting for these, or to ask anew: another group's may have become free meanwhile."""
        return not self._kept_for(pending.plan) and self.good(pending)

    def keep(self, reservation: GroupReservation) -> None:
        """For the next group of their size, of whichever slot: bound to its own, they could wait for it for ever."""
        self._kept.append((time.monotonic(), reservation))

    def give_back(self, groups_to_come: Mapping[ParallelPlan, int], now: float) -> None:
        """Let go of seats that nobody will come for: others may wait for exactly these GPUs."""
        for plan, coming in groups_to_come.items():
            coming += sum(reservation.plan == plan for _, reservation in self._waiting.values())
            kept = self._kept_for(plan)
            for since, reservation in kept[: max(0, len(kept) - coming)]:
                if now - since > KEEP_S:
                    self._kept.remove((since, reservation))
                    reservation.release()

    def occupy(self, reservation: GroupReservation) -> None:
        """All ranks of a group sit there."""
        reservation.used = reservation.occupied = True
        self._occupied.append(reservation)

    def vacate(self, reservation: GroupReservation) -> None:
        """The ranks are gone, if they had ever sat there."""
        reservation.occupied = False
        if reservation in self._occupied:
            self._occupied.remove(reservation)

    def find_room(self) -> BundleSlot | None:
        """Room for an encoder, in the group that has the fewest encoders."""
        rooms = (
            reservation.find_room()
            for reservation in sorted(self._occupied, key=lambda reservation: reservation.colocated_workers)
        )
        return next((room for room in rooms if room), None)

    def close(self) -> None:
        while self._kept:
            self._kept.pop()[1].release()

    def _kept_for(self, plan: ParallelPlan) -> list[tuple[float, GroupReservation]]:
        return [entry for entry in self._kept if entry[1].plan == plan]

    # Waiting ----------------------------------------------------------------------------------------------------------

    def waits(self, worker: WorkerId, reservation: GroupReservation, now: float) -> None:
        """Called again and again while a group has no seats; says what all of them wait for, when there is news."""
        since, _ = self._waiting[worker] = (self._waiting.get(worker, (now, reservation))[0], reservation)
        if now - since < FIRST_WORD_S or now - self._said[0] < SAY_EVERY_S:
            return
        text = self._why_waiting()
        if text != self._said[1]:
            logger.warning(text)
        self._said = (now, text)

    def placed(self, worker: WorkerId) -> None:
        self._waiting.pop(worker, None)
        self._placed.add(worker)

    def ended(self, worker: WorkerId) -> None:
        self._waiting.pop(worker, None)
        self._placed.discard(worker)

    def _why_waiting(self) -> str:
        nodes = alive_nodes()
        usable = [resources for node, resources in nodes.items() if node not in self._exclusion.excluded]
        plans = sorted(
            {reservation.plan for _, reservation in self._waiting.values()}, key=lambda plan: -plan.world_size
        )
        asked = [group_bundles(self._run, plan) for plan in plans]
        if can_place(asked[:1], usable):
            hope = "They begin when others let go of enough, or when nodes join."
        else:
            hope = "The nodes here could never hold one, however idle: they begin only when others join."
        return (
            f"{len(self._placed)} denoise group(s) have their place, {len(self._waiting)} wait for nodes. Each asks "
            f"for {' or '.join(map(format_bundles, asked))}; {show_cluster(list(nodes.values()))}. {hope}"
        )
