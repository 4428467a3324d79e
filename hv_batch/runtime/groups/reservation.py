"""The reservation of one denoise group: its placement group, which outlasts the ranks as long as its nodes are usable.

A group that is rebuilt in the same placement group cannot lose its GPUs to another job in between. The placement group
belongs to the driver, so Ray removes it if the driver is killed.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.protocol import ParallelPlan
from hv_batch.runtime.nodes.cluster_view import ClusterView
from hv_batch.runtime.nodes.resources import avoid_nodes, group_bundles

# States of a placement group that has lost no node. One that has is quicker replaced than waited for.
INTACT = ("PENDING", "PREPARED", "CREATED")

CONNECT_TIMEOUT_S = 1.0  # a node that is switched off refuses no connection, it does not answer

Address = tuple[str, int]  # host and port


class GroupReservation:
    """Asks Ray for the resources of a group of `plan` at once. `avoid` are ids of nodes that must not be used."""

    def __init__(
        self, run: ResolvedRun, plan: ParallelPlan, name: str, avoid: frozenset[str], cluster: ClusterView
    ) -> None:
        self.plan = plan
        self.avoid = avoid
        self.was_occupied = False  # whether the ranks of a group have all started here before
        self.is_occupied = False  # whether the ranks of a group run here now
        self.is_released = False  # whether the placement group is removed once no encoder uses it
        self._cluster = cluster
        self._placed: list[str] = []
        self._encoders_per_node = run.colocated_per_node
        self._colocated_workers: Counter[int] = Counter()  # colocated encoders on each node, by the index of its bundle
        self._ranks_per_node = run.ranks_per_node(plan)
        bundles = group_bundles(run, plan)
        # STRICT_SPREAD puts each bundle on a node of its own. Otherwise Ray could put both halves of a group onto one
        # large node, and split the GPUs that another group needs on one node.
        strategy = "STRICT_SPREAD" if len(bundles) > 1 else "STRICT_PACK"
        self._group: PlacementGroup = placement_group(
            bundles, strategy=strategy, name=name, bundle_label_selector=[avoid_nodes(avoid)] * len(bundles)
        )

    def ready(self) -> ray.ObjectRef:
        """A reference that is ready once Ray has reserved the resources."""
        return self._group.ready()

    def is_intact(self) -> bool:
        """Whether no node of the reservation is lost."""
        entry = self._cluster.group_state(self._group)
        return (entry is None or entry["state"] in INTACT) and not any(map(self._cluster.has_lost, self.nodes()))

    def addresses(self) -> list[Address]:
        """Where the raylets of its nodes listen, to which the driver itself connects."""
        nodes = self._cluster.nodes()
        own = [nodes[node] for node in self.nodes() if node in nodes]
        return [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in own]

    def nodes(self) -> list[str]:
        """Ray's id of each node, in the order of the ranks; empty before the placement group is placed."""
        entry = self._cluster.group_state(self._group)
        return (entry and _nodes_of(entry)) or self._placed

    def note_placed(self) -> list[str]:
        """Ask Ray where the placement group has been placed, because the view is older. Returns as `nodes`."""
        self._placed = _nodes_of(placement_group_table(self._group))
        return self._placed

    def strategy(self, rank: int) -> PlacementGroupSchedulingStrategy:
        return self._on(rank // self._ranks_per_node)

    def find_slot(self) -> BundleSlot | None:
        """A slot for an encoder on the node that has the fewest; None if all nodes are full or no ranks run here."""
        if not self.is_occupied:
            return None
        node = min(range(len(self._group.bundle_specs)), key=lambda node: self._colocated_workers[node])
        if self._colocated_workers[node] >= self._encoders_per_node:
            return None
        self._colocated_workers[node] += 1
        return BundleSlot(self, node, self._on(node))

    @property
    def colocated_workers(self) -> int:
        return self._colocated_workers.total()

    def leave(self, slot: BundleSlot) -> None:
        """The encoder of `slot` has ended."""
        self._colocated_workers[slot.node] -= 1
        if self.is_released:
            self.release()

    def release(self) -> None:
        """Remove the placement group, or let the last encoder that uses it do so when it ends."""
        self.is_occupied, self.is_released = False, True
        if not self.colocated_workers:
            remove_placement_group(self._group)

    def _on(self, node: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=node)


@dataclass(frozen=True, slots=True, eq=False)
class BundleSlot:
    """The place of a colocated encoder, on one of the nodes of a reservation."""

    reservation: GroupReservation
    node: int  # index of the bundle
    strategy: PlacementGroupSchedulingStrategy

    def leave(self) -> None:
        self.reservation.leave(self)


def _nodes_of(entry: Mapping[str, Any]) -> list[str]:
    placed = entry["bundles_to_node_id"]
    return [placed[bundle] for bundle in sorted(placed) if placed[bundle]]


def all_answer(addresses: Iterable[Address]) -> bool:
    """Whether each accepts a TCP connection: Ray takes seconds to notice that a silent node is dead.

    Blocks for up to CONNECT_TIMEOUT_S an address.
    """
    return all(map(_answers, addresses))


def _answers(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
