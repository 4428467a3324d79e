"""Which workers there should be: whom to ask for, in what order, and whom to let go.

A stage's number of workers is the most it may have, or what was learnt of an `auto` pool (pool_sizing.py). They are asked
for as soon as there is work for them, and stay asked for while the cluster has no room: that is what an autoscaler
sees, and a node that joins is used at once. What the rest of the run can never keep busy, or the pool has too many of,
is let go; who runs a task never is.

On a cluster that is too small for everybody, the first worker of each stage comes before the second of any. Groups
may take what the other stages need, and nodes that are lost may leave these with too few workers, or none: a group
that waits for decoders renders nothing. So where they are the bottleneck and have waited too long for room, groups that
stand idle are given up one after the other, and none is asked for, until there is room enough. And where no group has
found room, idle workers of the other stages leave the nodes on which it may just be they that are in the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import ReleaseWorker, StartWorker, WorkerId
from hv_batch.job.scheduling.pool_sizing import PoolSizer
from hv_batch.job.scheduling.size_classes import SizeClassSlots
from hv_batch.job.scheduling.worker_slots import Status, WorkerSlot
from hv_batch.job.stages import Stage

# Groups are asked for first: only they need many GPUs of one node at once, and a single actor that lands there first
# would keep them out.
START_ORDER = (Stage.DENOISE, Stage.ENCODE, Stage.DECODE)

# What a stage without workers waits for a new node before others make room for it: an autoscaler takes minutes to
# bring one, and a group that is let go takes minutes to load again.
STARVED_AFTER_S = 300.0
MAKE_ROOM_EVERY_S = 30.0  # what is freed is taken within seconds; if that was too little, more is made
FAVOUR_S = 120.0  # room that nobody has taken by then was not what they lacked: groups may have it back

FEWER_DO = "fewer keep the groups from waiting"
NOT_NEEDED = "the rest of the run cannot keep it busy"
MAKES_ROOM = "another stage has waited too long for room"
ANOTHER_SIZE = "its GPUs are for groups of another size, which have samples and no room"


class WorkerScaling:
    """Every worker slot of every stage."""

    def __init__(self, limits: Mapping[Stage, StageLimits], pools: PoolSizer) -> None:
        self._pools = pools
        self._colocated = frozenset(stage for stage in Stage if limits[stage].is_colocated)
        self._slots = {stage: _make_slots(stage, limits[stage]) for stage in Stage}
        self.size_classes = SizeClassSlots(limits[Stage.DENOISE].sizes, self._slots[Stage.DENOISE])
        self._no_group_before = 0.0  # others shall find the room that was made for them

    def __iter__(self) -> Iterator[WorkerSlot]:
        for slots in self._slots.values():
            yield from slots

    def of(self, stage: Stage) -> list[WorkerSlot]:
        return self._slots[stage]

    def idle(self, stage: Stage) -> list[WorkerSlot]:
        """Who may be given a task of the stage: where it has no workers of its own, the groups. In the order in which
        they get it: where groups of one size could keep another's idle, in turn.
        """
        slots = self._slots[stage] or self._slots[Stage.DENOISE]
        idle = [slot for slot in slots if slot.status is Status.IDLE]
        are_mixed = slots is self._slots[Stage.DENOISE] and len(self.size_classes) > 1
        return sorted(idle, key=lambda slot: slot.beat) if are_mixed else idle

    def ready(self, stage: Stage, size_class: int) -> int:
        """How many workers do, or could do, tasks of the stage; groups, those of the size class."""
        slots = self._slots[stage] or self._slots[Stage.DENOISE]
        return sum(slot.ready for slot in slots if stage is not Stage.DENOISE or slot.size_class == size_class)

    def find(self, worker: WorkerId) -> WorkerSlot | None:
        """The slot that lives this life; None when it is over."""
        slot = self._slots[worker.stage][worker.slot]
        return slot if slot.id == worker and slot.alive else None

    def given_up(self, stage: Stage) -> int | None:
        """The size class that is needed and of which no slot will ever start again. A stage without sizes is size class 0: it is
        given up when as many slots as it may have will never start again, and none else is left.
        """
        if stage is Stage.DENOISE:
            return self.size_classes.given_up()
        slots = self._slots[stage]
        abandoned = sum(slot.status is Status.ABANDONED for slot in slots)
        return 0 if abandoned >= self._pools.most(stage) and not any(slot.alive for slot in slots) else None

    def starts(self, needed: Mapping[Stage, int], now: float) -> Iterator[StartWorker]:
        """Ask for workers, where `needed` says how many of each stage could ever be busy."""
        for stage in START_ORDER:
            if stage is Stage.DENOISE:
                yield from _start(self.size_classes.starts(self.most_groups(needed, now), now), now)
                continue
            absent = [slot for slot in self._absent(stage) if now >= slot.start_at]
            yield from _start(absent[: self._missing(stage, needed) if absent else 0], now)

    def most_groups(self, needed: Mapping[Stage, int], now: float) -> int:
        """How many groups may live: none beside those that do while others shall find the room that was made."""
        if any(slot.placed for slot in self._slots[Stage.DENOISE]) and now < self._no_group_before:
            return 0
        return self._most(Stage.DENOISE, needed)

    def _most(self, stage: Stage, needed: Mapping[Stage, int]) -> int:
        served = all(any(slot.placed for slot in self._slots[other]) for other in self._in_need(needed))
        return self._pools.most(stage) if served else 1

    def _missing(self, stage: Stage, needed: Mapping[Stage, int]) -> int:
        """How many more encoders or decoders there should be: now, or when the pause after a loss is over."""
        if needed[Stage.DENOISE] and not any(slot.placed for slot in self._slots[Stage.DENOISE]):
            return 0
        wanted = min(needed[stage], self._most(stage, needed))
        return max(0, min(wanted - sum(slot.alive for slot in self._slots[stage]), len(self._absent(stage))))

    def _absent(self, stage: Stage) -> list[WorkerSlot]:
        """Who could be started, of as many slots as there may be workers.

        Not those beyond, which an `auto` pool keeps to grow: they would jump the pause after a loss.
        """
        slots = [slot for slot in self._slots[stage] if slot.status is not Status.ABANDONED]
        return [slot for slot in slots[: self._pools.most(stage)] if slot.status is Status.ABSENT]

    def surplus(self, needed: Mapping[Stage, int]) -> Iterator[ReleaseWorker]:
        """Let go whom the rest of the run cannot keep busy, where it is known to need no more than `needed`, and who is
        too many in an `auto` pool.
        """
        enough = {stage: min(most := self._pools.most(stage), needed.get(stage, most)) for stage in Stage}
        shares = [(self._slots[stage], enough[stage]) for stage in (Stage.ENCODE, Stage.DECODE)]
        for slots, most in [*shares, *(self.size_classes.shares() if needed else ())]:
            too_many = sum(slot.alive for slot in slots) - most
            if too_many > 0:
                yield from _release(_spare(slots)[:too_many], NOT_NEEDED if needed else FEWER_DO)

    def placed(self, stage: Stage) -> int:
        """How many workers hold their resources, loaded or not."""
        return sum(slot.placed for slot in self._slots[stage])

    def trades(self, now: float) -> Iterator[ReleaseWorker]:
        """Let go of groups of one size for those of another, before they get a further sample."""
        for slot in self.size_classes.trades(now):
            yield from _release([slot], ANOTHER_SIZE)

    def make_room(self, needed: Mapping[Stage, int], bottleneck: Stage | None, now: float) -> Iterator[ReleaseWorker]:
        """Let go of idle workers where another stage has none, or is the bottleneck, and waits too long for room."""
        if not self._waiting(Stage.ENCODE) and not self._waiting(Stage.DECODE):
            self._no_group_before = 0.0
        for stage in self._in_need(needed):
            if not any(now - slot.asked_at >= STARVED_AFTER_S for slot in self._waiting(stage)):
                continue
            deserted = not any(slot.placed for slot in self._slots[stage])
            if not (deserted or stage is bottleneck):
                continue
            if stage is not Stage.DENOISE and self.idle(Stage.DENOISE):
                yield from self._give_up_a_group(stage, now)
            for other in {Stage.ENCODE, Stage.DECODE} - {stage} - self._colocated if deserted else ():
                # Before a group has its place nobody else is asked for: they come back when it has left them room.
                spare = _spare(self._slots[other]) if stage is Stage.DENOISE else self._beyond_one(other)
                yield from _release(spare, MAKES_ROOM)

    def _give_up_a_group(self, stage: Stage, now: float) -> Iterator[ReleaseWorker]:
        """One that stands idle makes room for many single actors; groups that wait would take that room again."""
        self._no_group_before = now + FAVOUR_S
        for slot in self._waiting(stage):
            slot.asked_at = now + MAKE_ROOM_EVERY_S - STARVED_AFTER_S
        spare = self._beyond_one(Stage.DENOISE)
        idle = [slot for slot in spare if slot.status is Status.IDLE]
        yield from _release([slot for slot in spare if not slot.placed] + idle[:1], MAKES_ROOM)

    def _in_need(self, needed: Mapping[Stage, int]) -> list[Stage]:
        """The stages whose workers are needed and take resources of their own; colocated encoders take none."""
        return [stage for stage in Stage if needed[stage] and stage not in self._colocated]

    def _waiting(self, stage: Stage) -> list[WorkerSlot]:
        """Who has been asked for and has found no room yet."""
        return [slot for slot in self._slots[stage] if slot.status is Status.STARTING and not slot.placed]

    def _beyond_one(self, stage: Stage) -> list[WorkerSlot]:
        slots = self._slots[stage]
        return _spare(slots)[: max(0, sum(slot.alive for slot in slots) - 1)]


def _spare(slots: list[WorkerSlot]) -> list[WorkerSlot]:
    """Who runs nothing, first whom it costs least to let go: still waiting for room, then loading, then idle."""
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
