"""The faults of a simulated cluster: preempted nodes, dying processes, and nodes that join later."""

from __future__ import annotations

from collections.abc import Callable

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import WorkerLeaving, WorkerLost
from hv_batch.job.simulation.scenario import Scenario
from hv_batch.job.simulation.simulator import Simulator

HOUR_S = 3600.0


class Faults:
    """Schedules the faults of a scenario on the clock of a simulator."""

    def __init__(self, simulator: Simulator, scenario: Scenario) -> None:
        self._simulator = simulator
        self._scenario = scenario
        self._clock = simulator.clock
        self._random = simulator.random
        for at in scenario.joins_s:
            self._clock.at(at, simulator.cluster.join)
        self._later(scenario.failures_per_hour, self._fail)
        self._later(scenario.preemptions_per_hour, self._preempt)

    def _later(self, per_hour: float, fault: Callable[[], None]) -> None:
        if per_hour:
            self._clock.after(self._random.expovariate(per_hour / HOUR_S), fault)

    def _fail(self) -> None:
        ready = [worker for worker in self._simulator.cluster.workers.values() if worker.is_ready]
        if ready:
            worker = self._random.choice(ready).id
            self._simulator.send(WorkerLost(worker, Failure(FailureClass.INFRA, "its process died")))
        self._later(self._scenario.failures_per_hour, self._fail)

    def _preempt(self) -> None:
        scenario, nodes = self._scenario, self._simulator.cluster.nodes
        if nodes:
            node = self._random.choice(nodes)
            notice_s = 0.0 if self._random.random() < scenario.without_notice else scenario.notice_s
            if notice_s:
                self._simulator.cluster.drain(node)
                for worker in self._simulator.cluster.on_node(node):
                    self._simulator.send(WorkerLeaving(worker.id, self._clock.now + notice_s))
            self._clock.after(notice_s, lambda: self._simulator.lose_node(node))
            self._clock.after(notice_s + self._random.uniform(*scenario.replace_s), self._simulator.cluster.join)
        self._later(scenario.preemptions_per_hour, self._preempt)
