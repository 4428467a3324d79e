"""Task starts: which idle workers get which waiting samples."""

from __future__ import annotations

from collections.abc import Iterator

from hv_batch.job.scheduling.backpressure import Backpressure
from hv_batch.job.scheduling.messages import Run
from hv_batch.job.scheduling.object_store_budget import ObjectStoreBudget
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.scheduling.workers.scaling import WorkerScaling
from hv_batch.job.scheduling.workers.worker_slots import WorkerSlot
from hv_batch.job.stages import Stage


class TaskStarts:
    """Gives waiting samples to idle workers as far as backpressure allows."""

    def __init__(
        self, queues: Queues, scaling: WorkerScaling, backpressure: Backpressure, store_budget: ObjectStoreBudget
    ) -> None:
        self._queues = queues
        self._scaling = scaling
        self._backpressure = backpressure
        self._store_budget = store_budget

    def start(self, stage: Stage, now: float) -> Iterator[Run]:
        """Start tasks of the stage.

        A task that starts takes room in the queue of the next stage and gives none back. So a size class of which no
        sample may start is left out for the rest of the loop, however many of its groups are idle.
        """
        if not self._queues.waiting(stage) or not self._scaling.has_idle(stage):
            return
        full: set[int] = set()
        for worker in self._scaling.idle(stage, without=full):
            size_class = self._backpressure.size_class_for(stage, worker.size_class)
            if size_class is not None:
                if run := self._start(worker, stage, size_class, now):
                    yield run
            elif stage is Stage.DENOISE:
                full.add(worker.size_class)
            else:
                return

    def _start(self, worker: WorkerSlot, stage: Stage, size_class: int, now: float) -> Run | None:
        if stage is Stage.DECODE and not self._finds_decode(worker):
            return None
        if stage is Stage.DENOISE:
            self._queues.prefer_lora(size_class, worker.lora)
        workers = self._scaling.ready(stage, size_class)
        if not (most := self._backpressure.task_size_for(worker.id, stage, size_class, workers)):
            return None
        worker.run(self._queues.take_batch(stage, size_class, most), now)
        if stage is Stage.DENOISE:
            worker.lora = self._queues.lora(worker.task[0])
        if stage is not Stage.DECODE:
            self._store_budget.reserve(worker.id, worker.task)
        return Run(worker.id, worker.task, stage)

    def _finds_decode(self, worker: WorkerSlot) -> bool:
        """Whether the worker may decode a waiting sample, which is then the first of the queue.

        A sample whose decode failed waits for another ready worker, because the node of the first may be faulty.
        """
        slot = worker.id.stage, worker.id.slot
        return not self._scaling.has_another_decoder(worker) or self._queues.bring_forward(Stage.DECODE, slot)
