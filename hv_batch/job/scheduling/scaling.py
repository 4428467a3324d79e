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

from collections.abc import Iterable, Iterator, Mapping

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import ReleaseWorker, StartWorker, WorkerId
from hv_batch.job.scheduling.pool_sizing import PoolSizer
from hv_batch.job.scheduling.size_classes import SizeClassSlots
from hv_batch.job.scheduling.worker_slots import Status, WorkerSlot
from hv_batch.job.stages import Stage

# Groups are requested first: only they need many GPUs of one node at once, and a single actor that is placed there
# first would block them.
START_ORDER = (Stage.DENOISE, Stage.ENCODE, Stage.DECODE)

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
        self._colocated = frozenset(stage for stage in Stage if limits[stage].is_colocated)
        self._slots = {stage: _make_slots(stage, limits[stage]) for stage in Stage}
        self.size_classes = SizeClassSlots(limits[Stage.DENOISE].sizes, self._slots[Stage.DENOISE])
        self._no_group_before = 0.0  # until then, freed resources are reserved for other stages

    def __iter__(self) -> Iterator[WorkerSlot]:
        for slots in self._slots.values():
            yield from slots

    def slots(self, stage: Stage) -> list[WorkerSlot]:
        return self._slots[stage]

    def idle(self, stage: Stage) -> list[WorkerSlot]:
        """Idle workers that can run tasks of the stage, in the order in which they get them.

        For a stage without workers of its own these are the groups. Groups of several sizes take turns, so that one
        size does not leave another idle.
        """
        slots = self._slots[stage] or self._slots[Stage.DENOISE]
        idle = [slot for slot in slots if slot.status is Status.IDLE]
        are_mixed = slots is self._slots[Stage.DENOISE] and len(self.size_classes) > 1
        return sorted(idle, key=lambda slot: slot.last_heartbeat_at) if are_mixed else idle

    def ready(self, stage: Stage, size_class: int) -> int:
        """How many ready workers can run tasks of the stage; for DENOISE, only groups of the size class count."""
        slots = self._slots[stage] or self._slots[Stage.DENOISE]
        return sum(slot.ready for slot in slots if stage is not Stage.DENOISE or slot.size_class == size_class)

    def has_another_decoder(self, worker: WorkerSlot) -> bool:
        """Whether another ready worker can run decodes, now or after its task."""
        slots = self._slots[Stage.DECODE] or self._slots[Stage.DENOISE]
        return any(slot.ready and slot is not worker for slot in slots)

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
        abandoned = sum(slot.status is Status.ABANDONED for slot in slots)
        return 0 if abandoned >= self._pools.most(stage) and not any(slot.alive for slot in slots) else None

    def starts(self, needed: Mapping[Stage, int], now: float) -> Iterator[StartWorker]:
        """Start workers. `needed` is how many workers of each stage the samples in flight can keep busy."""
        for stage in START_ORDER:
            if stage is Stage.DENOISE:
                yield from _start(self.size_classes.starts(self.most_groups(needed, now), now), now)
                continue
            absent = [slot for slot in self._absent(stage) if now >= slot.start_at]
            yield from _start(absent[: self._missing(stage, needed) if absent else 0], now)

    def most_groups(self, needed: Mapping[Stage, int], now: float) -> int:
        """How many groups may be alive; 0, so that none starts, while freed resources are reserved for other stages."""
        if any(slot.placed for slot in self._slots[Stage.DENOISE]) and now < self._no_group_before:
            return 0
        return self._most(Stage.DENOISE, needed)

    def _most(self, stage: Stage, needed: Mapping[Stage, int]) -> int:
        served = all(any(slot.placed for slot in self._slots[other]) for other in self._in_need(needed))
        return self._pools.most(stage) if served else 1

    def _missing(self, stage: Stage, needed: Mapping[Stage, int]) -> int:
        """How many more encoders or decoders should start, including slots that pause after a loss."""
        if needed[Stage.DENOISE] and not any(slot.placed for slot in self._slots[Stage.DENOISE]):
            return 0
        wanted = min(needed[stage], self._most(stage, needed))
        return max(0, min(wanted - sum(slot.alive for slot in self._slots[stage]), len(self._absent(stage))))

    def _absent(self, stage: Stage) -> list[WorkerSlot]:
        """The absent slots among as many slots as the stage may have workers.

        The further slots into which an `auto` pool can grow are excluded: they would bypass the pause after a loss.
        """
        slots = [slot for slot in self._slots[stage] if slot.status is not Status.ABANDONED]
        return [slot for slot in slots[: self._pools.most(stage)] if slot.status is Status.ABSENT]

    def surplus(self, needed: Mapping[Stage, int]) -> Iterator[ReleaseWorker]:
        """Release workers beyond the size of an `auto` pool and, at the tail of a run, beyond `needed`.

        `needed` is empty before the tail, when more samples will come.
        """
        enough = {stage: min(most := self._pools.most(stage), needed.get(stage, most)) for stage in Stage}
        shares = [(self._slots[stage], enough[stage]) for stage in (Stage.ENCODE, Stage.DECODE)]
        for slots, most in [*shares, *(self.size_classes.shares() if needed else ())]:
            too_many = sum(slot.alive for slot in slots) - most
            if too_many > 0:
                yield from _release(_releasable(slots)[:too_many], NOT_NEEDED if needed else POOL_TOO_LARGE)

    def placed(self, stage: Stage) -> int:
        """How many workers hold their resources, loaded or not."""
        return sum(slot.placed for slot in self._slots[stage])

    def exchanges(self, now: float) -> Iterator[ReleaseWorker]:
        """Release groups of one size in favour of another size, before they get a further sample."""
        for slot in self.size_classes.exchanges(now):
            yield from _release([slot], OTHER_SIZE)

    def make_room(self, needed: Mapping[Stage, int], bottleneck: Stage | None, now: float) -> Iterator[ReleaseWorker]:
        """Release idle workers if a stage has waited too long for resources and has none, or is the bottleneck."""
        if not self._unplaced(Stage.ENCODE) and not self._unplaced(Stage.DECODE):
            self._no_group_before = 0.0
        for stage in self._in_need(needed):
            if not any(now - slot.requested_at >= STARVED_AFTER_S for slot in self._unplaced(stage)):
                continue
            has_none = not any(slot.placed for slot in self._slots[stage])
            if not (has_none or stage is bottleneck):
                continue
            if stage is not Stage.DENOISE and self.idle(Stage.DENOISE):
                yield from self._release_a_group(stage, now)
            for other in {Stage.ENCODE, Stage.DECODE} - {stage} - self._colocated if has_none else ():
                # Until a group is placed, no other worker is requested, so these come back only after the group has
                # found its resources.
                spare = _releasable(self._slots[other]) if stage is Stage.DENOISE else self._all_but_one(other)
                yield from _release(spare, MAKES_ROOM)

    def _release_a_group(self, stage: Stage, now: float) -> Iterator[ReleaseWorker]:
        """Release one idle group, which makes room for many single actors, and the groups that are not placed yet.

        The latter would otherwise take the freed resources.
        """
        self._no_group_before = now + RESERVED_FOR_S
        for slot in self._unplaced(stage):
            slot.requested_at = now + MAKE_ROOM_EVERY_S - STARVED_AFTER_S
        spare = self._all_but_one(Stage.DENOISE)
        idle = [slot for slot in spare if slot.status is Status.IDLE]
        yield from _release([slot for slot in spare if not slot.placed] + idle[:1], MAKES_ROOM)

    def _in_need(self, needed: Mapping[Stage, int]) -> list[Stage]:
        """Stages whose workers are needed and take resources of their own, which colocated encoders do not."""
        return [stage for stage in Stage if needed[stage] and stage not in self._colocated]

    def _unplaced(self, stage: Stage) -> list[WorkerSlot]:
        """Workers that are requested and not placed yet."""
        return [slot for slot in self._slots[stage] if slot.status is Status.STARTING and not slot.placed]

    def _all_but_one(self, stage: Stage) -> list[WorkerSlot]:
        """Releasable workers of a stage that leave at least one alive."""
        slots = self._slots[stage]
        return _releasable(slots)[: max(0, sum(slot.alive for slot in slots) - 1)]


def _releasable(slots: list[WorkerSlot]) -> list[WorkerSlot]:
    """Workers without a task, the cheapest to release first: not placed yet, then loading, then idle."""
    spare = [slot for slot in slots if slot.status in (Status.STARTING, Status.IDLE)]
    return sorted(spare, key=lambda slot: (slot.status is Status.IDLE, slot.placed))


def _make_slots(stage: Stage, limits: StageLimits) -> list[WorkerSlot]:
    size_classes = [size_class for size_class, size in enumerate(limits.sizes) for _ in range(size.workers)]
    return [WorkerSlot(WorkerId(stage, slot, 0), size_class) for slot, size_class in enumerate(size_classes)]


def _start(slots: Iterable[WorkerSlot], now: float) -> Iterator[StartWorker]:
    for slot in slots:
        slot.start(now)
        yield StartWorker(slot.id, slot.size_class)


def _release(slots: list[WorkerSlot], reason: str) -> Iterator[ReleaseWorker]:
    for slot in slots:
        worker = slot.id
        slot.end()
        yield ReleaseWorker(worker, reason)
