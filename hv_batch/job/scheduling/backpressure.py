"""Backpressure: how many samples may be admitted, and how many a worker may process now (P7).

The queues between the stages are bounded. A stage starts a task only if the next stage has queue places for the results
and the worker has object-store budget for them (object_store_budget.py). Queue lengths are measured in tasks: a
micro-batch of quick samples (micro_batches.py) takes one place. It is no more work than one long sample, and a queue
length in samples would leave workers idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.scheduling.micro_batches import MicroBatcher
from hv_batch.job.scheduling.object_store_budget import ObjectStoreBudget
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.stages import STAGES, Stage
from hv_batch.job.workload import Workload

# Samples are admitted in portions, because each admission costs a step of the scheduler and a message. A 64th of the
# room empties no queue: the encoders' and the groups' queues hold more than that.
PORTIONS = 64
MAX_SPOOLED = 10_000  # videos on the disks of nodes: the driver keeps a record of each


class Backpressure:
    """Computes the size of the next task or admission from the queues, the budget and measured task times."""

    def __init__(self, limits: Mapping[Stage, StageLimits], queues: Queues, store_budget: ObjectStoreBudget) -> None:
        self._limits = limits
        self._queues = queues
        self._store_budget = store_budget
        self._micro_batcher = MicroBatcher()

    @property
    def window(self) -> int:
        """Maximum number of samples at the stages: the capacity of all stages if every task is a full batch."""
        return sum(self._capacity(stage, self._limits[stage].batch) for stage in Stage)

    def measure(self, stage: Stage, work: Sequence[Workload | None], seconds: float) -> None:
        """Record a task that took `seconds` for each of its samples."""
        if stage is not Stage.ENCODE:
            self._micro_batcher.measure(stage, work, seconds)

    def admissible(self) -> int:
        """How many further samples of the plan may be admitted; 0 if they are less than a portion."""
        most = sum([self._capacity(stage, self._task_size(stage)) for stage in STAGES])
        encode, denoise = self._limits[Stage.ENCODE], self._limits[Stage.DENOISE]
        early = self._queues.at(Stage.ENCODE) + self._queues.waiting(Stage.DENOISE)
        ahead = encode.ahead + encode.workers * encode.batch + denoise.ahead * self._task_size(Stage.DENOISE)
        room = min(most - len(self._queues), ahead - early)
        return room if room >= max(1, min(most, ahead) // PORTIONS) else 0

    def size_class_for(self, stage: Stage, own: int) -> int | None:
        """The size class of an idle worker's next task, or None if no sample may start.

        A denoise runs in the worker's `own` size class; other stages take the one whose next sample is the oldest.
        """
        if stage is Stage.DENOISE:
            return own if self._queues.waiting(stage, own) and self._room_for(stage, own) > 0 else None
        size_classes = self._queues.size_classes(stage)
        if len(size_classes) == 1:
            return 0 if self._queues.waiting(stage, 0) and self._room_for(stage, 0) > 0 else None
        return self._queues.oldest(
            stage, (size_class for size_class in size_classes if self._room_for(stage, size_class) > 0)
        )

    def task_size_for(self, worker: WorkerId, stage: Stage, size_class: int, workers: int) -> int:
        """How many waiting samples of a size class, shared by `workers` workers, this worker may process now."""
        return min(self.batch_size_for(worker, stage, size_class, workers), self._room_for(stage, size_class))

    def batch_size_for(self, worker: WorkerId, stage: Stage, size_class: int, workers: int = 1) -> int:
        """Like `task_size_for`, but without regard to the queue of the next stage."""
        upcoming = self._queues.upcoming(stage, size_class, self._limits[stage].batch)
        if stage is not Stage.ENCODE:
            batch_size = self._micro_batcher.batch_size(stage, map(self._queues.work, upcoming))
            fair_share = -(-self._queues.waiting(stage, size_class) // max(1, workers))
            upcoming = upcoming[: min(batch_size, fair_share)]
        return len(upcoming) if stage is Stage.DECODE else self._store_budget.room(worker, upcoming)

    def room_after(self, stage: Stage, size_class: int | None = None) -> int:
        """Free queue places of the next stage, in samples, if every running task of this stage delivers its results.

        After ENCODE, each size class has its own places. After DECODE, the places are the spools on the nodes' disks.
        """
        if stage is Stage.DECODE:
            return MAX_SPOOLED - self._queues.spooled - self._queues.at(stage) + self._queues.waiting(stage)
        next_stage, size_class = Stage(stage + 1), size_class if stage is Stage.ENCODE else None
        running = self._queues.at(stage, size_class) - self._queues.waiting(stage, size_class)
        limits = self._limits[next_stage]
        ahead = limits.ahead if size_class is None else limits.sizes[size_class].ahead
        return ahead * self._task_size(next_stage) - self._queues.waiting(next_stage, size_class) - running

    def _room_for(self, stage: Stage, size_class: int) -> int:
        """How many samples of a size class a task may start with now, by the queue of the next stage.

        While groups have work, an encoder waits for room for a full batch, which takes hardly longer than one sample.
        """
        room = self.room_after(stage, size_class)
        can_wait = stage is Stage.ENCODE and self._queues.waiting(Stage.DENOISE, size_class) > 0
        return 0 if can_wait and room < self._limits[stage].batch else room

    def _task_size(self, stage: Stage) -> int:
        """The typical number of samples of a task of the stage."""
        limits = self._limits[stage]
        if stage is Stage.ENCODE:
            return limits.batch
        return min(limits.batch, self._micro_batcher.typical_batch_size(stage))

    def _capacity(self, stage: Stage, task_size: int) -> int:
        """Samples that a stage holds, running and waiting, if a task takes `task_size` samples."""
        limits = self._limits[stage]
        ahead = limits.ahead if stage is Stage.ENCODE else limits.ahead * task_size
        return ahead + limits.workers * task_size
