"""How many samples may go where: bounded queues between the stages, and tasks that take no more than has room (P7).

A stage begins no task whose results the next one has no room for, nor one whose results the object store has none for
beside what else its worker has made (object_store_budget.py). Queues are measured in tasks. One of several quick samples
(micro_batches.py) has the room of one: they are as little work, and no queue keeps a worker waiting for their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.scheduling.micro_batches import MicroBatcher
from hv_batch.job.scheduling.object_store_budget import ObjectStoreBudget
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload

SPOOLED_AT_MOST = 10_000  # videos on the disks of nodes, of which the driver keeps account


class Backpressure:
    """Asked before anything begins; told how long tasks took."""

    def __init__(self, limits: Mapping[Stage, StageLimits], queues: Queues, store_budget: ObjectStoreBudget) -> None:
        self._limits = limits
        self._queues = queues
        self._store_budget = store_budget
        self._micro_batcher = MicroBatcher()

    @property
    def window(self) -> int:
        """Most samples at the stages: what these hold while every queue is full, of quick ones if any."""
        return sum(self._holds(stage, self._limits[stage].batch) for stage in Stage)

    def measure(self, stage: Stage, work: Sequence[Workload | None], seconds: float) -> None:
        """A task took so many seconds for each of its samples."""
        if stage is not Stage.ENCODE:
            self._micro_batcher.measure(stage, work, seconds)

    def admissible(self) -> int:
        """How many samples of the plan may come."""
        most = sum(self._holds(stage, self._task_size(stage)) for stage in Stage)
        encode, denoise = self._limits[Stage.ENCODE], self._limits[Stage.DENOISE]
        early = self._queues.at(Stage.ENCODE) + self._queues.waiting(Stage.DENOISE)
        ahead = encode.ahead + encode.workers * encode.batch + denoise.ahead * self._task_size(Stage.DENOISE)
        return max(0, min(most - len(self._queues), ahead - early))

    def size_class_for(self, stage: Stage, own: int) -> int | None:
        """Where an idle worker finds its next samples: to denoise, in its `own` size class, else where any wait longest."""
        size_classes = [own] if stage is Stage.DENOISE else self._queues.size_classes(stage)
        return self._queues.oldest(
            stage, (size_class for size_class in size_classes if self._room_for(stage, size_class) > 0)
        )

    def task_for(self, worker: WorkerId, stage: Stage, size_class: int, workers: int) -> int:
        """How many of a size class's next samples one of `workers` that share them may work on now."""
        return min(self.may_make(worker, stage, size_class, workers), self._room_for(stage, size_class))

    def may_make(self, worker: WorkerId, stage: Stage, size_class: int, workers: int = 1) -> int:
        """As `task_for`, wherever the results go: for what they weigh, and for the time that they take."""
        upcoming = self._queues.upcoming(stage, size_class, self._limits[stage].batch)
        if stage is not Stage.ENCODE:
            together = self._micro_batcher.fitting(stage, map(self._queues.work, upcoming))
            fair = -(-self._queues.waiting(stage, size_class) // max(1, workers))
            upcoming = upcoming[: min(together, fair)]
        return len(upcoming) if stage is Stage.DECODE else self._store_budget.room(worker, upcoming)

    def room_behind(self, stage: Stage, size_class: int | None = None) -> int:
        """How many more samples the next stage could hold if everything running here arrived: for each size of groups
        its own, all of it for decoders. What comes behind these are the disks of the nodes.
        """
        if stage is Stage.DECODE:
            return SPOOLED_AT_MOST - self._queues.aside - self._queues.at(stage) + self._queues.waiting(stage)
        behind, size_class = Stage(stage + 1), size_class if stage is Stage.ENCODE else None
        coming = self._queues.at(stage, size_class) - self._queues.waiting(stage, size_class)
        ahead = self._limits[behind].ahead if size_class is None else self._limits[behind].sizes[size_class].ahead
        return ahead * self._task_size(behind) - self._queues.waiting(behind, size_class) - coming

    def _room_for(self, stage: Stage, size_class: int) -> int:
        """How many samples a task may begin with now. While groups have work, an encoder waits until a whole batch has
        room: it takes hardly longer than one sample.
        """
        room = self.room_behind(stage, size_class)
        can_wait = stage is Stage.ENCODE and self._queues.waiting(Stage.DENOISE, size_class) > 0
        return 0 if can_wait and room < self._limits[stage].batch else room

    def _task_size(self, stage: Stage) -> int:
        """How many samples a task of the stage takes as things are."""
        limits = self._limits[stage]
        return limits.batch if stage is Stage.ENCODE else min(limits.batch, self._micro_batcher.usual(stage))

    def _holds(self, stage: Stage, task_size: int) -> int:
        """Samples that run at a stage and wait there."""
        limits = self._limits[stage]
        ahead = limits.ahead if stage is Stage.ENCODE else limits.ahead * task_size
        return ahead + limits.workers * task_size
