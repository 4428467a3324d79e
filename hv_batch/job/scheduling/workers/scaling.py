"""Worker scaling: which workers to start, in which order, and which to release.

The number of workers of a stage is at most its configured limit, or the measured size of an `auto` pool
(pool_sizing.py). Workers are requested as soon as there is work for them, and stay requested while the cluster has no
room: an autoscaler sees the pending requests, and a new node is used at once. Workers that the rest of the run cannot
keep busy, or that exceed the size of their pool, are released. A worker with a running task is never released.

On a cluster that is too small for all workers, the first worker of each stage starts before the second of any. Groups
may occupy the resources that other stages need, and lost nodes may leave these with too few workers or none. A group
that waits for decoders renders nothing. So if encoders or decoders are the bottleneck and have waited too long for
resources, idle groups are released one by one, and none is requested, until the resources are sufficient. Conversely,
if no group finds resources, idle workers of the other stages are released, because they may occupy its nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import ReleaseWorker, StartWorker, WorkerId
from hv_batch.job.scheduling.pool_sizing import PoolSizer
from hv_batch.job.scheduling.workers.size_classes import SizeClassSlots
from hv_batch.job.scheduling.workers.stage_slots import RELEASABLE, StageSlots
from hv_batch.job.scheduling.workers.task_watch import TaskWatch
from hv_batch.job.scheduling.workers.worker_slots import READY, Status, WorkerSlot
from hv_batch.job.stages import STAGES, Stage

# Groups are requested first: only they need many GPUs of one node at once, and a single actor that is placed there
# first would block them.
START_ORDER = (Stage.DENOISE, Stage.ENCODE, Stage.DECODE)
POOLS = (Stage.ENCODE, Stage.DECODE)

# How long a stage without workers waits for a new node before others make room for it: an autoscaler takes minutes to
# add a node, and a released group takes minutes to load again.
STARVED_AFTER_S = 300.0
MAKE_ROOM_EVERY_S = 30.0  # freed resources are taken within seconds; if they were not enough, more are freed
RESERVED_FOR_S = 120.0  # if freed resources are not taken within this time, groups may have them back

POOL_TOO_LARGE = "fewer workers keep the groups busy"
NOT_NEEDED = "the rest of the run cannot keep it busy"
MAKES_ROOM = "another stage has waited too long for resources"
OTHER_SIZE = "its GPUs are needed by groups of another size"


class WorkerScaling:
    """The worker slots of all stages."""

    def __init__(self, limits: Mapping[Stage, StageLimits], pools: PoolSizer) -> None:
        self._pools = pools
        self._colocated = frozenset(stage for stage in STAGES if limits[stage].is_colocated)
        self._slots = {stage: StageSlots(stage, limits[stage].sizes) for stage in STAGES}
        self.size_classes = SizeClassSlots(limits[Stage.DENOISE].sizes, self._slots[Stage.DENOISE])
        self.watch = TaskWatch(limits)
        self._no_group_before = 0.0  # until then, freed resources are reserved for other stages
        for slot in self:
            slot.on_change = self._note_change

    def _note_change(self, slot: WorkerSlot) -> None:
        self._slots[slot.id.stage].file(slot)
        self.watch.note(slot)

    def __iter__(self) -> Iterator[WorkerSlot]:
        for slots in self._slots.values():
            yield from slots

    def busy(self, stage: Stage) -> list[WorkerSlot]:
        """The workers of the stage that have a task, of whatever stage."""
        return self._slots[stage].having((Status.BUSY,))

    def count_busy(self, stage: Stage) -> int:
        """How many workers of the stage have a task, of whatever stage."""
        return self._slots[stage].count(Status.BUSY)

    def count_starting(self) -> int:
        """How many workers are requested or loading."""
        return sum(slots.alive() - slots.ready() for slots in self._slots.values())

    def idle(self, stage: Stage, without: Collection[int] = ()) -> Iterator[WorkerSlot]:
        """Idle workers that can run tasks of the stage, in the order in which they get them.

        For a stage without workers of its own these are the groups. The caller may give a worker a task, or change the
        size classes `without`, whose workers are left out, before it takes the next.
        """
        return self._tasked(stage).idle_in_turn(without)

    def has_idle(self, stage: Stage) -> bool:
        return self._tasked(stage).count(Status.IDLE) > 0

    def ready(self, stage: Stage, size_class: int) -> int:
        """How many ready workers can run tasks of the stage; for DENOISE, only groups of the size class count."""
        return self._tasked(stage).ready(size_class if stage is Stage.DENOISE else None)

    def has_another_decoder(self, worker: WorkerSlot) -> bool:
        """Whether another ready worker can run decodes, now or after its task."""
        return self._tasked(Stage.DECODE).ready() > (worker.status in READY)

    def count_ready(self, stage: Stage, besides: Iterable[int] = ()) -> int:
        """How many workers of the stage are ready. The slots `besides` count as well, ready or not."""
        slots = self._slots[stage]
        return slots.ready() + sum(slots[number].status not in READY for number in besides)

    def _tasked(self, stage: Stage) -> StageSlots:
        """The slots whose workers run tasks of the stage."""
        return self._slots[stage] or self._slots[Stage.DENOISE]

    def find(self, worker: WorkerId) -> WorkerSlot | None:
        """The slot of this incarnation, or None if the incarnation has ended."""
        slot = self._slots[worker.stage][worker.slot]
        return slot if slot.id == worker and slot.alive else None

    def abandoned(self, stage: Stage) -> int | None:
        """A size class with samples in flight of which every slot is abandoned, or None.

        A stage without sizes has the single size class 0. It is abandoned if as many slots as it may have workers are
        abandoned and no worker is alive.
        """
        if stage is Stage.DENOISE:
            return self.size_classes.abandoned()
        slots = self._slots[stage]
        return 0 if not slots.alive() and slots.count(Status.ABANDONED) >= self._pools.most(stage) else None

    def starts(self, needed: Mapping[Stage, int], now: float) -> Iterator[StartWorker]:
        """Start workers. `needed` is how many workers of each stage the samples in flight can keep busy."""
        for stage in START_ORDER:
            if stage is Stage.DENOISE:
                if self._slots[stage].alive() < self._pools.most(stage):
                    yield from _start(self.size_classes.starts(self.most_groups(needed, now), now), now)
            else:
                yield from _start(self._missing(stage, needed, now), now)

    def most_groups(self, needed: Mapping[Stage, int], now: float) -> int:
        """How many groups may be alive; 0, so that none starts, while freed resources are reserved for other stages."""
        if self.placed(Stage.DENOISE) and now < self._no_group_before:
            return 0
        return self._most(Stage.DENOISE, needed)

    def _most(self, stage: Stage, needed: Mapping[Stage, int]) -> int:
        served = all(self.placed(other) for other in self._in_need(needed))
        return self._pools.most(stage) if served else 1

    def _missing(self, stage: Stage, needed: Mapping[Stage, int], now: float) -> list[WorkerSlot]:
        """The encoders or decoders that should start.

        The further slots into which an `auto` pool can grow do not start for slots that pause after a loss: they would
        bypass the pause.
        """
        alive = self._slots[stage].alive()
        if alive >= min(needed[stage], self._pools.most(stage)):
            return []
        if needed[Stage.DENOISE] and not self.placed(Stage.DENOISE):
            return []
        missing = max(0, min(needed[stage], self._most(stage, needed)) - alive)
        return self._slots[stage].startable(self._pools.most(stage), missing, now)

    def surplus(self, needed: Mapping[Stage, int]) -> Iterator[ReleaseWorker]:
        """Release workers beyond the size of an `auto` pool and, at the tail of a run, beyond `needed`.

        `needed` is empty before the tail, when more samples will come.
        """
        for stage in POOLS:
            most = self._pools.most(stage)
            most = min(most, needed.get(stage, most))
            if self._slots[stage].alive() > most:
                yield from self._release_beyond(stage, None, most, is_tail=bool(needed))
        if needed:
            for size_class in range(len(self.size_classes)):
                most = self.size_classes.needed(size_class)
                yield from self._release_beyond(Stage.DENOISE, size_class, most, is_tail=True)

    def _release_beyond(
        self, stage: Stage, size_class: int | None, most: int, *, is_tail: bool
    ) -> Iterator[ReleaseWorker]:
        slots = self._slots[stage]
        too_many = slots.alive(size_class) - most
        if too_many > 0:
            reason = NOT_NEEDED if is_tail else POOL_TOO_LARGE
            yield from _release(slots.having(RELEASABLE, size_class)[:too_many], reason)

    def placed(self, stage: Stage) -> int:
        """How many workers hold their resources, loaded or not."""
        return self._slots[stage].placed()

    def exchanges(self, now: float) -> Iterator[ReleaseWorker]:
        """Release groups of one size in favour of another size, before they get a further sample."""
        for slot in self.size_classes.exchanges(now):
            yield from _release([slot], OTHER_SIZE)

    def make_room(
        self, needed: Mapping[Stage, int], bottleneck: Callable[[], Stage | None], now: float
    ) -> Iterator[ReleaseWorker]:
        """Release idle workers if a stage has waited too long for resources and has none, or is the bottleneck."""
        if self._no_group_before and not any(self._slots[each].count(Status.REQUESTED) for each in POOLS):
            self._no_group_before = 0.0
        starved = [stage for stage in self._in_need(needed) if self._is_starved(stage, now)]
        slow = bottleneck() if starved else None
        for stage in starved:
            if not self._is_starved(stage, now):  # it was released for the stage before
                continue
            has_none = not self.placed(stage)
            if not (has_none or stage is slow):
                continue
            if stage is not Stage.DENOISE and self.has_idle(Stage.DENOISE):
                yield from self._release_a_group(stage, now)
            for other in {Stage.ENCODE, Stage.DECODE} - {stage} - self._colocated if has_none else ():
                # Until a group is placed, no other worker is requested, so these come back only after the group has
                # found its resources.
                spare = self._slots[other].having(RELEASABLE) if stage is Stage.DENOISE else self._all_but_one(other)
                yield from _release(spare, MAKES_ROOM)

    def _is_starved(self, stage: Stage, now: float) -> bool:
        return now - self._slots[stage].first_request() >= STARVED_AFTER_S

    def _release_a_group(self, stage: Stage, now: float) -> Iterator[ReleaseWorker]:
        """Release one idle group, which makes room for many single actors, and the groups that are not placed yet.

        The latter would otherwise take the freed resources.
        """
        self._no_group_before = now + RESERVED_FOR_S
        for slot in self._slots[stage].having((Status.REQUESTED,)):
            slot.postpone_request(now + MAKE_ROOM_EVERY_S - STARVED_AFTER_S)
        spare = self._all_but_one(Stage.DENOISE)
        idle = [slot for slot in spare if slot.status is Status.IDLE]
        yield from _release([slot for slot in spare if slot.status is Status.REQUESTED] + idle[:1], MAKES_ROOM)

    def _in_need(self, needed: Mapping[Stage, int]) -> list[Stage]:
        """Stages whose workers are needed and take resources of their own, which colocated encoders do not."""
        return [stage for stage in STAGES if needed[stage] and stage not in self._colocated]

    def _all_but_one(self, stage: Stage) -> list[WorkerSlot]:
        """Releasable workers of a stage that leave at least one alive, the cheapest to release first."""
        slots = self._slots[stage]
        return slots.having(RELEASABLE)[: max(0, slots.alive() - 1)]


def _start(slots: Iterable[WorkerSlot], now: float) -> Iterator[StartWorker]:
    for slot in slots:
        slot.start(now)
        yield StartWorker(slot.id, slot.size_class)


def _release(slots: list[WorkerSlot], reason: str) -> Iterator[ReleaseWorker]:
    for slot in slots:
        worker = slot.id
        slot.end()
        yield ReleaseWorker(worker, reason)
