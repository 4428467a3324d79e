"""The reservations of a run's denoise groups: the retained ones, and one log line for all groups that wait.

A group asks here for its reservation. What groups wait for is logged for all of them together: on a cluster that is too
small for `groups.count`, the operator needs one line and not one a group.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.scheduling.messages import Event, WorkerId
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan
from hv_batch.runtime.groups.group_share import GroupShare
from hv_batch.runtime.groups.reservation import BundleSlot, GroupReservation, all_answer
from hv_batch.runtime.nodes.autoscaler import REMEDY, ignores_labels
from hv_batch.runtime.nodes.cluster_view import ClusterView
from hv_batch.runtime.nodes.exclusion import NodeExclusion
from hv_batch.runtime.nodes.resources import (
    SAY_EVERY_S,
    can_place,
    format_bundles,
    group_bundles,
    show_cluster,
)

logger = logging.getLogger(__name__)

# Ray places a group on idle nodes within a second; a line about each would be noise.
FIRST_LINE_S = 5.0

# How long a reservation is retained that no group is expected to use: a retry at the end of a run first waits for an
# encoder that had been released, which Ray places within seconds if there is room.
RETAIN_S = 10.0

# Runs its first argument in an I/O thread, and its second with the result in the loop's thread.
Submit = Callable[[Callable[[], bool], Callable[[bool], list[Event]]], None]


class ReservationPool:
    """One for all groups of a run. `submit` is the driver's, for the probes of nodes."""

    def __init__(self, run: ResolvedRun, exclusion: NodeExclusion, cluster: ClusterView, submit: Submit) -> None:
        self._run = run
        self._exclusion = exclusion
        self._cluster = cluster
        self._submit = submit
        self._retained: list[tuple[float, GroupReservation]] = []  # with the time since when
        self._probing: list[GroupReservation] = []  # retained ones whose nodes are being probed
        self._occupied: list[GroupReservation] = []
        self._serial = count()
        self._share = GroupShare(run)
        self._held: list[GroupReservation] = []  # all that are not released
        # Groups for which `groups.max_share` leaves no room now, in the order of their requests.
        self._deferred: dict[WorkerId, tuple[ParallelPlan, Callable[[GroupReservation], None]]] = {}
        self._waiting: dict[WorkerId, tuple[float, GroupReservation]] = {}  # since when, and for what
        self._placed: set[WorkerId] = set()
        self._logged: tuple[float, str] = (-math.inf, "")  # time and text of the last line

    # Reservations -----------------------------------------------------------------------------------------------------

    def request(self, worker: WorkerId, plan: ParallelPlan, grant: Callable[[GroupReservation], None]) -> None:
        """Call `grant` with a reservation for a group of `plan`: a retained one that is usable, otherwise a new one.

        A new one is granted at once, a retained one after its nodes have been probed, and one that exceeds the run's
        share of the cluster later, by `grant_deferred`.
        """
        for since, retained in self._retained_for(plan):
            self._retained.remove((since, retained))
            if self.is_usable(retained):
                self._probing.append(retained)
                probe = partial(all_answer, retained.addresses())
                self._submit(probe, partial(self._probed, retained, worker, grant))
                return
            retained.release()
        if self._deferred or not self._fits(plan):
            if not self._deferred:
                logger.info(f"{self._share.describe(self._cluster.alive().values())}: further groups wait")
            self._deferred[worker] = (plan, grant)
            return
        self._reserve(worker, plan, grant)

    @property
    def deferred(self) -> int:
        """How many groups wait because of the run's share, and not for nodes."""
        return len(self._deferred)

    def grant_deferred(self) -> None:
        """Grant what groups wait for because of the run's share, if there is room now. To be called in every poll."""
        for worker, (plan, grant) in list(self._deferred.items()):
            if not self._fits(plan):
                return
            del self._deferred[worker]
            self._reserve(worker, plan, grant)

    def _fits(self, plan: ParallelPlan) -> bool:
        self._held = [reservation for reservation in self._held if not reservation.is_released]
        held = [reservation.plan for reservation in self._held]
        return self._share.admits(plan, held, self._cluster.alive().values())

    def _reserve(self, worker: WorkerId, plan: ParallelPlan, grant: Callable[[GroupReservation], None]) -> None:
        name = f"hv-group-{worker.slot}-{next(self._serial)}"
        avoid = self._exclusion.avoided(Stage.DENOISE)
        reservation = GroupReservation(self._run, plan, name, avoid, self._cluster)
        self._held.append(reservation)
        grant(reservation)

    def _probed(
        self, retained: GroupReservation, worker: WorkerId, grant: Callable[[GroupReservation], None], answered: bool
    ) -> list[Event]:
        self._probing.remove(retained)
        if answered and self.is_usable(retained):
            grant(retained)
        else:
            retained.release()
            self.request(worker, retained.plan, grant)
        return []

    def is_usable(self, reservation: GroupReservation) -> bool:
        """Whether a group may be built there: no node is lost, and none has been excluded since the request."""
        nodes, excluded = reservation.nodes(), self._exclusion.excluded
        is_allowed = excluded.isdisjoint(nodes) if nodes else reservation.avoid == excluded
        return is_allowed and reservation.is_intact()

    def is_worth_waiting_for(self, pending: GroupReservation) -> bool:
        """False if a new request may be served sooner: another group's reservation is retained, or this one is lost."""
        return not self._retained_for(pending.plan) and self.is_usable(pending)

    def retain(self, reservation: GroupReservation) -> None:
        """Keep it for the next group of its plan, whatever its slot: that of its own may never be started again."""
        self._retained.append((time.monotonic(), reservation))

    def release_unused(self, groups_to_come: Mapping[ParallelPlan, int], now: float) -> None:
        """Release retained reservations beyond the groups to come: other jobs may wait for exactly these GPUs."""
        for plan, coming in groups_to_come.items():
            coming += sum(reservation.plan == plan for _, reservation in self._waiting.values())
            retained = self._retained_for(plan)
            for since, reservation in retained[: max(0, len(retained) - coming)]:
                if now - since > RETAIN_S:
                    self._retained.remove((since, reservation))
                    reservation.release()

    def mark_occupied(self, reservation: GroupReservation) -> None:
        """All ranks of a group have started there."""
        reservation.was_occupied = reservation.is_occupied = True
        self._occupied.append(reservation)

    def mark_free(self, reservation: GroupReservation) -> None:
        """The ranks have been killed, if they had started."""
        reservation.is_occupied = False
        if reservation in self._occupied:
            self._occupied.remove(reservation)

    def find_slot(self) -> BundleSlot | None:
        """A slot for an encoder, in the group that has the fewest encoders."""
        slots = (
            reservation.find_slot()
            for reservation in sorted(self._occupied, key=lambda reservation: reservation.colocated_workers)
        )
        return next((slot for slot in slots if slot), None)

    def close(self) -> None:
        """Release what no group holds."""
        while self._retained:
            self._retained.pop()[1].release()
        while self._probing:
            self._probing.pop().release()

    def _retained_for(self, plan: ParallelPlan) -> list[tuple[float, GroupReservation]]:
        return [entry for entry in self._retained if entry[1].plan == plan]

    # Waiting ----------------------------------------------------------------------------------------------------------

    def waits(self, worker: WorkerId, reservation: GroupReservation, now: float) -> None:
        """To be called in every poll while a group is not placed. Logs what all groups wait for, if it has changed."""
        since, _ = self._waiting[worker] = (self._waiting.get(worker, (now, reservation))[0], reservation)
        if now - since < FIRST_LINE_S or now - self._logged[0] < SAY_EVERY_S:
            return
        text = self._why_waiting()
        if text != self._logged[1]:
            logger.warning(text)
        self._logged = (now, text)

    def placed(self, worker: WorkerId) -> None:
        """The actors of the group have been started in its reservation."""
        self._waiting.pop(worker, None)
        self._placed.add(worker)

    def ended(self, worker: WorkerId) -> None:
        """The group has been killed or released."""
        self._deferred.pop(worker, None)
        self._waiting.pop(worker, None)
        self._placed.discard(worker)

    def _why_waiting(self) -> str:
        nodes = self._cluster.alive()
        hardware = show_cluster(list(nodes.values()), self._cluster.free())
        usable = [resources for node, resources in nodes.items() if node not in self._exclusion.excluded]
        plans = sorted(
            {reservation.plan for _, reservation in self._waiting.values()}, key=lambda plan: -plan.world_size
        )
        asked = [group_bundles(self._run, plan) for plan in plans]
        if can_place(asked[:1], usable):
            outlook = "They start when other jobs release enough, or when nodes join."
        else:
            outlook = "No node is large enough, even when idle: they start only if larger nodes join."
        if self._exclusion.excluded and ignores_labels():
            outlook += (
                f" The autoscaler is version 1 and counts the excluded nodes as usable: it may add none. {REMEDY}."
            )
        return (
            f"{len(self._placed)} denoise group(s) are placed, {len(self._waiting)} wait for nodes. Each asks "
            f"for {' or '.join(map(format_bundles, asked))}; {hardware}. {outlook}"
        )
