"""The samples in flight. Each is in exactly one place: waiting at a stage, in one running task, or spooled."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from hv_batch.job.failure import Failure
from hv_batch.job.scheduling.object_store_budget import ObjectStoreBudget
from hv_batch.job.stages import STAGES, Stage
from hv_batch.job.workload import Workload

Slot = tuple[Stage, int]  # stage and slot of a worker, without its incarnation

# A group prefers samples with the LoRAs that its weights have, because a change reads every weight that the LoRAs touch
# from the checkpoint. At most this number of tasks begin before an older sample, so that no sample, and with it the
# table of its shard, waits for the end of a long manifest.
MAX_OVERTAKES = 64


@dataclass(slots=True)
class _Sample:
    stage: Stage
    size_class: int
    order: int  # of admission
    latent_bytes: int
    work: Workload | None
    lora: str = ""
    overtaken: int = 0  # tasks of samples behind it that began before it
    solo: bool = False  # was in a batch that failed, so it runs alone from now on
    avoids: Slot | None = None  # where its decode failed last
    failures: list[Failure] = field(default_factory=list)


class Queues:
    """One queue for each size class at ENCODE and DENOISE, and a single queue at DECODE.

    Counts are updated incrementally, because the scheduler of a thousand GPUs reads them hundreds of times a second.
    Methods that take an optional size class count over all size classes if it is None.
    """

    def __init__(self, store_budget: ObjectStoreBudget, size_classes: int = 1) -> None:
        self._store_budget = store_budget  # follows every change of a sample's stage
        self._samples: dict[str, _Sample] = {}
        self._spooled: dict[str, _Sample] = {}
        self._waiting: dict[Stage, list[deque[str]]] = {
            stage: [deque() for _ in range(1 if stage is Stage.DECODE else size_classes)] for stage in Stage
        }
        self._at: Counter[tuple[Stage, int | None]] = Counter()  # by size class, and over all size classes (None)
        # LoRAs of the samples that wait for a denoise, by size class: a group must not search a queue for a sample that
        # is not in it.
        self._loras: list[Counter[str]] = [Counter() for _ in range(size_classes)]
        self._admitted = 0

    def __len__(self) -> int:
        """Samples at the stages. Spooled samples are not included, here or in any other count."""
        return len(self._samples)

    @property
    def spooled(self) -> int:
        return len(self._spooled)

    def stages(self) -> dict[str, Stage]:
        """The stage of every sample that is at one, by key."""
        return {key: sample.stage for key, sample in self._samples.items()}

    def stage_of(self, key: str) -> Stage:
        return self._samples[key].stage

    def size_classes(self, stage: Stage) -> range:
        return range(len(self._waiting[stage]))

    def waiting(self, stage: Stage, size_class: int | None = None) -> int:
        """Samples that wait at the stage."""
        queues = self._waiting[stage]
        return sum(map(len, queues)) if size_class is None else len(queues[size_class])

    def at(self, stage: Stage, size_class: int | None = None) -> int:
        """Samples that wait or run at the stage."""
        return self._at[stage, size_class]

    def at_or_before(self, stage: Stage, size_class: int | None = None) -> int:
        """Samples that the stage has yet to complete: those at it and at earlier stages."""
        return sum([self._at[each, size_class] for each in STAGES[: stage + 1]])

    def oldest(self, stage: Stage, size_classes: Iterable[int]) -> int | None:
        """Of these size classes, the one whose next sample was admitted first; None if no sample waits."""
        queues = {size_class: self._waiting[stage][size_class] for size_class in size_classes}
        waiting = [size_class for size_class, queue in queues.items() if queue]
        return min(waiting, key=lambda size_class: self._samples[queues[size_class][0]].order, default=None)

    def failures(self, key: str) -> list[Failure]:
        """The failures charged to the sample; the caller may append to the list."""
        return self._samples[key].failures

    def work(self, key: str) -> Workload | None:
        return self._samples[key].work

    def admit(
        self, key: str, stage: Stage, latent_bytes: int, size_class: int, work: Workload | None, lora: str = ""
    ) -> None:
        assert key not in self._samples, f"sample {key} admitted twice"
        self._admitted += 1
        self._enter(key, _Sample(stage, size_class, self._admitted, latent_bytes, work, lora))

    def advance(self, key: str) -> None:
        """The running task completed the sample's stage: queue it at the next one, or remove it after the last."""
        stage = self._samples[key].stage
        if stage is Stage.DECODE:
            self.remove(key)
        else:
            self._move(key, Stage(stage + 1))
            self._enqueue(key)

    def put_back(self, key: str, stage: Stage, *, first: bool) -> None:
        """The running task failed: queue the sample at `stage`, before the waiting samples if `first`, else after."""
        self._move(key, stage)
        self._enqueue(key, first=first)

    def run_alone(self, key: str) -> None:
        """From now on, the sample is the only one of its tasks."""
        self._samples[key].solo = True

    def avoid(self, key: str, slot: Slot) -> None:
        """From now on, the sample is decoded by another worker than that of `slot` if there is one."""
        self._samples[key].avoids = slot

    def bring_forward(self, stage: Stage, slot: Slot) -> bool:
        """Move the first waiting sample that does not avoid `slot` to the front. Returns whether there is one."""
        queue = self._waiting[stage][0]
        for index, key in enumerate(queue):
            if self._samples[key].avoids != slot:
                del queue[index]
                queue.appendleft(key)
                return True
        return False

    def lora(self, key: str) -> str:
        return self._samples[key].lora

    def prefer_lora(self, size_class: int, lora: str) -> None:
        """Move the first sample that waits for a denoise with these LoRAs to the front.

        Nothing changes if there is none, or if the sample at the front has been overtaken MAX_OVERTAKES times.
        """
        queue = self._waiting[Stage.DENOISE][size_class]
        first = self._samples[queue[0]]
        if first.lora == lora or first.overtaken >= MAX_OVERTAKES or not self._loras[size_class][lora]:
            return
        for index, key in enumerate(queue):
            if self._samples[key].lora == lora:
                first.overtaken += 1
                del queue[index]
                queue.appendleft(key)
                return

    def remove(self, key: str) -> None:
        """Remove a sample whose task has ended. It is no longer in flight."""
        self._store_budget.release(key, None)
        self._count(key, -1)
        del self._samples[key]

    def spool(self, key: str) -> None:
        """Take a sample whose task has ended off the stages, with all its object-store bytes, but remember it."""
        sample = self._samples[key]
        self.remove(key)
        self._spooled[key] = sample

    def unspool(self, key: str, stage: Stage) -> None:
        """Queue a spooled sample at `stage` again."""
        sample = self._spooled.pop(key)
        sample.stage = stage
        self._enter(key, sample)

    def remove_spooled(self, key: str) -> None:
        """Remove a spooled sample. It is no longer in flight."""
        del self._spooled[key]

    def upcoming(self, stage: Stage, size_class: int, most: int) -> list[str]:
        """The next samples of a queue, at most `most`."""
        return list(islice(self._waiting[stage][size_class], most))

    def take_batch(self, stage: Stage, size_class: int, most: int) -> tuple[str, ...]:
        """Dequeue the next samples for one task, at least one. A denoise takes samples with equal LoRAs only."""
        queue = self._waiting[stage][size_class]
        batch = [self._dequeue(queue)]
        while queue and len(batch) < most:
            if stage is Stage.DENOISE and self._samples[queue[0]].lora != self._samples[batch[0]].lora:
                break
            if self._samples[batch[0]].solo or self._samples[queue[0]].solo or self._samples[queue[0]].avoids:
                break
            batch.append(self._dequeue(queue))
        return tuple(batch)

    def _enter(self, key: str, sample: _Sample) -> None:
        self._store_budget.track(key, sample.latent_bytes)
        self._samples[key] = sample
        self._count(key, 1)
        self._enqueue(key)

    def _move(self, key: str, stage: Stage) -> None:
        self._store_budget.release(key, stage)
        self._count(key, -1)
        self._samples[key].stage = stage
        self._count(key, 1)

    def _count(self, key: str, change: int) -> None:
        sample = self._samples[key]
        self._at[sample.stage, sample.size_class] += change
        self._at[sample.stage, None] += change

    def _enqueue(self, key: str, *, first: bool = False) -> None:
        sample = self._samples[key]
        queue = self._waiting[sample.stage][0 if sample.stage is Stage.DECODE else sample.size_class]
        if first:
            queue.appendleft(key)
        else:
            queue.append(key)
        if sample.stage is Stage.DENOISE:
            self._loras[sample.size_class][sample.lora] += 1

    def _dequeue(self, queue: deque[str]) -> str:
        key = queue.popleft()
        sample = self._samples[key]
        if sample.stage is Stage.DENOISE:
            loras = self._loras[sample.size_class]
            loras[sample.lora] -= 1
            if not loras[sample.lora]:
                del loras[sample.lora]
        return key
