"""Measure what one step of the scheduler costs with few and with many denoise groups.

Each scheduler gets the events of a run in its steady state: all groups are busy, and each task that ends is followed by
another. Times are CPU times, and the schedulers alternate in one process, so that their ratio hardly depends on the
load of the machine.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.scheduling.capacity import retry_limits
from hv_batch.job.scheduling.messages import (
    Action,
    Admit,
    Admitted,
    Event,
    Run,
    StartWorker,
    TaskDone,
    WorkerId,
    WorkerReady,
)
from hv_batch.job.scheduling.scheduler import Scheduler
from hv_batch.job.stages import Stage

ENCODERS, DECODERS = 0.05, 0.2  # for each group
SECONDS = {Stage.ENCODE: 1.0, Stage.DENOISE: 338.0, Stage.DECODE: 60.0}  # of a task; 720p on eight GPUs
WARM_UP_TASKS = 4  # of each group, before the measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    groups: int
    steps: int
    microseconds: float  # CPU time of one step: the median of the rounds
    ratio: float  # to the time with the first number of groups

    def render(self) -> str:
        return (
            f"{self.groups:,} groups: {self.microseconds:.0f} us a step ({self.steps:,} steps), ratio {self.ratio:.2f}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SteadyRun:
    """A scheduler with `groups` groups, and the tasks that run, in the order in which they end."""

    def __init__(self, groups: int) -> None:
        encoders, decoders = max(1, int(ENCODERS * groups)), max(1, int(DECODERS * groups))
        config = RunConfig.model_validate(
            {"groups": {"count": groups}, "encoders": {"count": encoders}, "decoders": {"count": decoders}}
        )
        limits = resolve_run(config).stage_limits({})
        self.scheduler = Scheduler(limits, retry_limits(config, 0), config.timeouts.drain_s)
        self.now = 0.0
        self._keys = count()
        self._events: deque[Event] = deque()
        self._tasks: list[tuple[float, int, WorkerId]] = []
        self._take(self.scheduler.begin())
        self._step_through()
        self.run(WARM_UP_TASKS * groups)

    def run(self, tasks: int) -> tuple[int, float]:
        """End this many tasks. Returns the number of steps and the seconds that they took."""
        steps, seconds = 0, 0.0
        for _ in range(tasks):
            self.now, _, worker = heapq.heappop(self._tasks)
            self._events.append(TaskDone(worker))
            taken = self._step_through()
            steps, seconds = steps + taken[0], seconds + taken[1]
        return steps, seconds

    def _step_through(self) -> tuple[int, float]:
        steps, seconds = 0, 0.0
        while self._events:
            event = self._events.popleft()
            begun = time.thread_time()
            actions = self.scheduler.step(event, self.now)
            seconds += time.thread_time() - begun
            steps += 1
            self._take(actions)
        return steps, seconds

    def _take(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Admit(wanted):
                    self._events.extend(Admitted(str(next(self._keys))) for _ in range(wanted))
                case StartWorker(worker):
                    self._events.append(WorkerReady(worker))
                case Run(worker, keys, stage):
                    # Tasks that start together end one after another, as in a run of several hours.
                    spread = 1 + (hash(keys[0]) % 1000) / 10_000
                    heapq.heappush(
                        self._tasks, (self.now + SECONDS[stage] * len(keys) * spread, next(self._keys), worker)
                    )


def bench_scheduler(groups: Sequence[int], tasks: int, rounds: int) -> list[StepReport]:
    """Time the steps of a scheduler for each number of groups. A round ends `tasks` tasks of each."""
    runs = [SteadyRun(number) for number in groups]
    taken: list[list[tuple[int, float]]] = [[] for _ in groups]
    for _ in range(rounds):
        for run, times in zip(runs, taken, strict=True):
            times.append(run.run(tasks))
    costs = [sorted(seconds / steps for steps, seconds in times)[rounds // 2] for times in taken]
    return [
        StepReport(
            groups=number,
            steps=sum(steps for steps, _ in times),
            microseconds=1e6 * cost,
            ratio=cost / costs[0],
        )
        for number, times, cost in zip(groups, taken, costs, strict=True)
    ]
