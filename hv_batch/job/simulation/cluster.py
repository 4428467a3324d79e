"""The simulated cluster: workers on nodes, from the request of their resources to their end, and what the GPUs did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hv_batch.job.scheduling.messages import Event, WorkerId, WorkerPlaced, WorkerReady
from hv_batch.job.simulation.clock import Clock
from hv_batch.job.simulation.fleet import Demand, Fleet
from hv_batch.job.simulation.ledger import WORK, Ledger, Use
from hv_batch.job.simulation.scenario import Scenario
from hv_batch.job.stages import Stage


@dataclass(slots=True, eq=False)
class SimulatedWorker:
    id: WorkerId
    demand: Demand
    nodes: tuple[int, ...] = ()  # empty until it is placed
    is_ready: bool = False
    keys: tuple[str, ...] = ()  # of its task
    stage: Stage = Stage.ENCODE  # of its task
    since: float = 0.0  # when it was placed, or when its task began or ended


class Cluster:
    """Workers are placed in the order of request; a worker that finds no room does not delay smaller ones."""

    def __init__(
        self,
        scenario: Scenario,
        demands: Mapping[tuple[Stage, int], Demand],
        clock: Clock,
        send: Callable[[Event], None],
    ) -> None:
        self._scenario = scenario
        self._demands = demands
        self._clock = clock
        self._send = send
        self._fleet = Fleet(scenario.gpus_per_node)
        self._waiting: dict[WorkerId, SimulatedWorker] = {}  # not placed yet, in the order of request
        self._has_room = False  # whether a placement may have become possible since the last attempt
        self._has_begun = False
        self._is_tail = False
        self.workers: dict[WorkerId, SimulatedWorker] = {}
        self.ledger = Ledger()
        for _ in range(scenario.nodes or 0):
            self.join()

    # Workers ----------------------------------------------------------------------------------------------------------

    def request(self, name: WorkerId, size_class: int) -> None:
        demand = self._demands[name.stage, size_class]
        self.workers[name] = self._waiting[name] = SimulatedWorker(name, demand)
        self._has_room = True

    def place(self) -> None:
        """Place the waiting workers for which there is room. They load, and are then ready."""
        if not (self._waiting and self._has_room):
            return
        self._has_room = False
        self.account_free()
        too_large: set[Demand] = set()
        for worker in list(self._waiting.values()):
            if worker.demand in too_large:
                continue
            if nodes := self._fleet.place(worker.demand):
                self._load(worker, nodes)
            else:
                too_large.add(worker.demand)

    def _load(self, worker: SimulatedWorker, nodes: tuple[int, ...]) -> None:
        del self._waiting[worker.id]
        worker.nodes, worker.since = nodes, self._clock.now
        self._send(WorkerPlaced(worker.id))
        self._clock.after(self._scenario.load_s.of(worker.id.stage), lambda: self._become_ready(worker))

    def _become_ready(self, worker: SimulatedWorker) -> None:
        if self.workers.get(worker.id) is worker:
            self._account(worker, Use.START_UP)
            worker.is_ready = True
            self._send(WorkerReady(worker.id))

    def begin_task(self, worker: SimulatedWorker, keys: tuple[str, ...], stage: Stage) -> None:
        self._account(worker, self._idle_use(worker))
        worker.keys, worker.stage = keys, stage

    def end_task(self, worker: SimulatedWorker, *, is_good: bool) -> None:
        worker.keys = ()
        self._account(worker, WORK[worker.stage] if is_good else Use.FAILURE)

    def end(self, name: WorkerId, lost: Use, saved_s: float = 0.0) -> float:
        """End a worker. Its task is lost, except for `saved_s`. Returns the lost GPU-seconds."""
        worker = self.workers.pop(name)
        self._waiting.pop(name, None)
        if not worker.nodes:
            return 0.0
        self.account_free()
        lost_s = 0.0
        if worker.keys:
            lost_s = self._clock.now - worker.since - saved_s
            self.ledger.add(WORK[worker.stage], worker.demand.total, saved_s)
            self.ledger.add(lost, worker.demand.total, lost_s)
        else:
            self._account(worker, self._idle_use(worker) if worker.is_ready else Use.START_UP)
        self._fleet.release(worker.nodes, worker.demand)
        self._has_room = True
        return lost_s * worker.demand.total

    # Nodes ------------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[int]:
        """The nodes that are not draining."""
        return self._fleet.nodes

    @property
    def has_draining(self) -> bool:
        return self._fleet.has_draining

    def on_node(self, node: int) -> list[SimulatedWorker]:
        return [worker for worker in self.workers.values() if node in worker.nodes]

    def join(self) -> None:
        """Another node joins the cluster."""
        self.account_free()
        self._fleet.join()
        self._has_room = True

    def drain(self, node: int) -> None:
        self.account_free()
        self._fleet.drain(node)

    def leave(self, node: int) -> None:
        """Remove a draining node that holds no worker."""
        self.account_free()
        self._fleet.leave(node)

    # Accounts ---------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The scheduler starts. Until then, the GPUs were lost to the start of the run."""
        self.account_free()
        self._has_begun = True

    def begin_tail(self) -> None:
        """No sample is admitted any more. From now on, idle GPUs belong to the tail."""
        if self._is_tail:
            return
        self.account_free()
        for worker in self.workers.values():
            if worker.is_ready and not worker.keys:
                self._account(worker, self._idle_use(worker))
        self._is_tail = True

    def account_free(self) -> None:
        """Account for the GPUs without a worker. Must be called before their number changes."""
        use = Use.START_UP if not self._has_begun else Use.TAIL if self._is_tail else Use.UNUSED
        self.ledger.add_free(self._fleet.free, self._fleet.draining, self._clock.now, use)

    def _idle_use(self, worker: SimulatedWorker) -> Use:
        if self._is_tail:
            return Use.TAIL
        return Use.IDLE_GROUPS if worker.id.stage is Stage.DENOISE else Use.IDLE_POOLS

    def _account(self, worker: SimulatedWorker, use: Use) -> None:
        """Account for the GPUs of a worker since the last call."""
        self.ledger.add(use, worker.demand.total, self._clock.now - worker.since)
        worker.since = self._clock.now
