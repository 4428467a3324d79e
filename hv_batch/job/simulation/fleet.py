"""The simulated nodes, and which workers they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

EPSILON = 1e-6  # of sums of GPU shares


@dataclass(frozen=True, slots=True)
class Demand:
    """The GPUs that a worker reserves on each of several nodes."""

    gpus: float
    nodes: int = 1

    @property
    def total(self) -> float:
        return self.gpus * self.nodes


class Fleet:
    """Nodes with free GPUs. A worker gets the fullest nodes that have room for it."""

    def __init__(self, gpus_per_node: int) -> None:
        self._gpus_per_node = gpus_per_node
        self._free: dict[int, float] = {}
        self._draining: set[int] = set()
        self._names = count()
        self.free = 0.0  # GPUs without a worker, on nodes that are not draining
        self.draining = 0.0  # the same on draining nodes

    @property
    def nodes(self) -> list[int]:
        """The nodes that are not draining."""
        return [node for node in self._free if node not in self._draining]

    @property
    def has_draining(self) -> bool:
        return bool(self._draining)

    def join(self) -> None:
        self._free[next(self._names)] = self._gpus_per_node
        self.free += self._gpus_per_node

    def drain(self, node: int) -> None:
        """From now on, the node gets no worker."""
        if node in self._draining:
            return
        self._draining.add(node)
        self.free -= self._free[node]
        self.draining += self._free[node]

    def leave(self, node: int) -> None:
        """Remove a draining node that holds no worker."""
        self._draining.remove(node)
        self.draining -= self._free.pop(node)

    def place(self, demand: Demand) -> tuple[int, ...] | None:
        """Reserve the GPUs and return the nodes, or None if there is no room."""
        fitting = [
            (free, node)
            for node, free in self._free.items()
            if free >= demand.gpus - EPSILON and node not in self._draining
        ]
        if len(fitting) < demand.nodes:
            return None
        chosen = (min(fitting),) if demand.nodes == 1 else sorted(fitting)[: demand.nodes]
        nodes = tuple(node for _, node in chosen)
        self._change(nodes, -demand.gpus)
        return nodes

    def release(self, nodes: Sequence[int], demand: Demand) -> None:
        self._change(nodes, demand.gpus)

    def _change(self, nodes: Sequence[int], gpus: float) -> None:
        for node in nodes:
            self._free[node] += gpus
            if node in self._draining:
                self.draining += gpus
            else:
                self.free += gpus
