"""The seats of one denoise group: its placement group, which outlives a life of the group while its nodes are fit.

A group that is rebuilt in the same placement group cannot lose its GPUs to somebody else in between. The placement group
belongs to this driver, so Ray reclaims it if we are killed.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.protocol import ParallelPlan
from hv_batch.runtime.nodes.resources import avoid_nodes, group_bundles

# What Ray calls a placement group that is whole, or has not been placed yet. Anything else has lost a node, and is
# quicker built anew than waited for.
SOUND = ("PENDING", "PREPARED", "CREATED")


# A node that is switched off refuses nothing; the driver stands still for so long, once a group that it takes along.
ANSWER_S = 1.0


class GroupReservation:
    """Asked for at once; `ready` tells when Ray has reserved them. `plan` is that of the group that is to sit there,
    `avoid` are ids of nodes that get no seat.
    """

    def __init__(self, run: ResolvedRun, plan: ParallelPlan, name: str, avoid: frozenset[str]) -> None:
        self.plan = plan
        self.avoid = avoid
        self.used = False  # whether ranks have sat here
        self.occupied = False  # whether ranks sit here now
        self.given_back = False
        self._rooms = run.colocated_per_node
        self._colocated_workers: Counter[int] = Counter()  # colocated encoders on each node, by the index of its bundle
        self._ranks_per_node = run.ranks_per_node(plan)
        bundles = group_bundles(run, plan)
        # Spread strictly, a bundle a node: or Ray could put both halves of a group onto one large node, whose GPUs
        # another group needs whole.
        strategy = "STRICT_SPREAD" if len(bundles) > 1 else "STRICT_PACK"
        self._group: PlacementGroup = placement_group(
            bundles, strategy=strategy, name=name, bundle_label_selector=[avoid_nodes(avoid)] * len(bundles)
        )

    def ready(self) -> ray.ObjectRef:
        return self._group.ready()

    def sound(self, alive: Collection[str]) -> bool:
        """Whether nothing of them is lost; `alive` are the ids of the nodes that there are."""
        return self._table()["state"] in SOUND and all(node in alive for node in self.nodes())

    def answer(self) -> bool:
        """Whether their nodes do, asked one by one: Ray takes seconds to believe that a silent node is dead."""
        mine = set(self.nodes())
        return all(answers(entry) for entry in ray.nodes() if entry["NodeID"] in mine)

    def nodes(self) -> list[str]:
        """Ray's id of each node, in the order of the ranks; empty while they are not placed."""
        placed = self._table()["bundles_to_node_id"]
        return [placed[bundle] for bundle in sorted(placed) if placed[bundle]]

    def strategy(self, rank: int) -> PlacementGroupSchedulingStrategy:
        return self._on(rank // self._ranks_per_node)

    def find_room(self) -> BundleSlot | None:
        """Room for an encoder on the node that has the fewest; None if all are full or no ranks sit here."""
        if not self.occupied:
            return None
        node = min(range(len(self._group.bundle_specs)), key=lambda node: self._colocated_workers[node])
        if self._colocated_workers[node] >= self._rooms:
            return None
        self._colocated_workers[node] += 1
        return BundleSlot(self, node, self._on(node))

    @property
    def colocated_workers(self) -> int:
        return self._colocated_workers.total()

    def leave(self, room: BundleSlot) -> None:
        self._colocated_workers[room.node] -= 1
        if self.given_back:
            self.release()

    def release(self) -> None:
        """Give them back when the last encoder has left."""
        self.occupied, self.given_back = False, True
        if not self.colocated_workers:
            remove_placement_group(self._group)

    def _on(self, node: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=node)

    def _table(self) -> dict[str, Any]:
        return placement_group_table(self._group)


@dataclass(frozen=True, slots=True, eq=False)
class BundleSlot:
    """A colocated encoder's, on one of the nodes of some seats."""

    reservation: GroupReservation
    node: int
    strategy: PlacementGroupSchedulingStrategy

    def leave(self) -> None:
        self.reservation.leave(self)


def answers(node: Mapping[str, Any]) -> bool:
    """Whether somebody listens where the node's raylet did; the driver itself talks to it there."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True
