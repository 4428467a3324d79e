"""Groups of several sizes: which size the next group has, and which group makes room for one of another size.

Every size is a size class, with worker slots and waiting samples of its own. What the size classes share is a budget of ranks, which
the groups that live never exceed together. A new group goes to a size class that has none, else to where most samples wait
for each group; sizes are chosen so that a sample takes about as long in every size class, so this evens out when they end.

A group that exists is worth keeping: another takes minutes to load. So it is let go for another size class only when

- it has been idle for as long as a load takes (to wait longer costs more than to load again, to wait less costs more
  when a sample comes: at worst twice what a prophet would have paid), its size class has fewer samples in flight than groups
  or the other size class has no group at all, and with others like it, it makes all the room that is wanted; or
- a size class has had samples and no group at all for PATIENCE_S. Then this size class has a claim: no other gets a group, and
  each of theirs goes when it has ended its sample, until the claim has found its place. So no size class starves while
  another has an endless supply, and a switch, with the minutes until a large group's ranks are gathered, stays a small
  part of the time between two.

Only one size class: groups come as they are needed, and never make room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hv_batch.job.scheduling.limits import SizeClass
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.scheduling.worker_slots import Status, WorkerSlot

LOAD_S = 120.0  # what a group takes until it renders: 26 GB of weights on every rank, and to meet
PATIENCE_S = 1800.0
PLACE_S = 30.0  # what is freed for a claim is taken within seconds; if that was too little, more is freed


class SizeClassSlots:
    """The slots of one stage, by size class.

    Slots are changed by the caller: what is yielded must have started, or ended, before the next is asked for.
    """

    def __init__(self, size_classes: Sequence[SizeClass], slots: Sequence[WorkerSlot]) -> None:
        self._size_classes = size_classes
        self._slots = [
            [slot for slot in slots if slot.size_class == size_class] for size_class in range(len(size_classes))
        ]
        self._budget = max(size_class.ranks * size_class.workers for size_class in size_classes)
        self._needed: Sequence[int] = [0] * len(size_classes)
        self._lacking: dict[int, float] = {}  # size classes with samples and no group that has its place; since when
        self._idle: dict[WorkerId, float] = {}  # since when
        self._claim: int | None = None
        self._freed = (0.0, 0)  # for the claim: when the last time, how many ranks

    def __len__(self) -> int:
        return len(self._size_classes)

    def note(self, needed: Sequence[int], now: float) -> None:
        """How many groups of each size class could be busy with what is in flight."""
        self._needed = needed
        if len(self._size_classes) == 1:
            return
        idle = [slot.id for slots in self._slots for slot in slots if slot.status is Status.IDLE]
        self._idle = {worker: self._idle.get(worker, now) for worker in idle}
        lacking = [
            size_class
            for size_class, slots in enumerate(self._slots)
            if needed[size_class] and not any(s.placed for s in slots)
        ]
        self._lacking = {size_class: self._lacking.get(size_class, now) for size_class in lacking}
        if self._claim not in self._lacking:
            first = min(self._lacking, key=self._lacking.__getitem__, default=None)
            is_due = first is not None and now - self._lacking[first] >= PATIENCE_S
            self._claim, self._freed = (first if is_due else None), (now, 0)

    def given_up(self) -> int | None:
        """A size class that is needed and has no slot left that will ever start again."""
        for size_class, slots in enumerate(self._slots):
            if self._needed[size_class] and all(slot.status is Status.ABANDONED for slot in slots):
                return size_class
        return None

    def shares(self) -> Iterator[tuple[list[WorkerSlot], int]]:
        """The slots of each size class, with how many of them its samples in flight can keep busy."""
        yield from zip(self._slots, self._needed, strict=True)

    def starts(self, most: int, now: float) -> Iterator[WorkerSlot]:
        """The slots that should start, while fewer than `most` live."""
        absent = [[slot for slot in slots if _may_start(slot, now)] for slots in self._slots]
        while sum(map(_alive, self._slots)) < most:
            size_classes = [
                size_class
                for size_class in range(len(self._size_classes))
                if absent[size_class] and self._may_grow(size_class)
            ]
            if not size_classes:
                return
            yield absent[max(size_classes, key=self._urgency)].pop(0)

    def to_come(self, most: int) -> list[int]:
        """How many slots of each size class would start if none had to pause after a loss."""
        room = most - sum(map(_alive, self._slots))
        found = []
        for size_class, (size, slots) in enumerate(zip(self._size_classes, self._slots, strict=True)):
            absent = sum(slot.status is Status.ABSENT for slot in slots)
            wanted = min(self._needed[size_class] - _alive(slots), absent, self._left() // size.ranks, room)
            found.append(max(0, wanted) if self._claim in (None, size_class) else 0)
        return found

    def _may_grow(self, size_class: int) -> bool:
        is_short = self._needed[size_class] > _alive(self._slots[size_class])
        return is_short and self._size_classes[size_class].ranks <= self._left() and self._claim in (None, size_class)

    def _urgency(self, size_class: int) -> tuple[bool, float]:
        alive = _alive(self._slots[size_class])
        return not alive, self._needed[size_class] / (alive + 1)

    def trades(self, now: float) -> Iterator[WorkerSlot]:
        """The slots whose groups are to make room for another size class."""
        if self._claim is not None:
            yield from self._make_room(self._claim, now)
        elif len(self._size_classes) > 1:
            for size_class in range(len(self._size_classes)):
                yield from self._swap(size_class, now)

    def _make_room(self, claim: int, now: float) -> Iterator[WorkerSlot]:
        """Whoever waits for room elsewhere would take it; whoever has ended a sample may go."""
        others = [slot for slots in self._slots for slot in slots if slot.size_class != claim]
        if not any(_is_waiting(slot) or _may_start(slot, now) for slot in self._slots[claim]):
            return
        yield from [slot for slot in others if _is_waiting(slot)]
        when, freed = self._freed
        wanted = self._size_classes[claim].ranks
        if freed >= wanted and now - when >= PLACE_S:
            freed = 0
        for slot in [slot for slot in others if slot.status is Status.IDLE]:
            has_room = not _alive(self._slots[claim]) and self._left() >= wanted
            if freed >= wanted or has_room:
                return
            freed += self._size_classes[slot.size_class].ranks
            self._freed = (now, freed)
            yield slot

    def _swap(self, size_class: int, now: float) -> Iterator[WorkerSlot]:
        """Groups that have had nothing to do for long, for one that would have: all it takes, or none."""
        if (short := self._short(size_class, now)) <= 0:
            return
        others = [other for other in range(len(self._size_classes)) if other != size_class]
        spare = [slot for other in others for slot in self._spare(other, now, for_all=size_class in self._lacking)]
        if sum(self._size_classes[slot.size_class].ranks for slot in spare) < short:
            return
        for slot in spare:
            if short <= 0:
                return
            short -= self._size_classes[slot.size_class].ranks
            yield slot

    def _short(self, size_class: int, now: float) -> int:
        """The ranks that the next group of a size class lacks."""
        slots, ranks = self._slots[size_class], self._size_classes[size_class].ranks
        waiting = [slot for slot in slots if _is_waiting(slot)]
        if any(now - slot.asked_at >= LOAD_S for slot in waiting):
            return ranks  # it is within the budget, but the cluster has not as many
        may_grow = self._needed[size_class] > _alive(slots) and any(_may_start(slot, now) for slot in slots)
        return ranks - self._left() if may_grow and not waiting else 0

    def _spare(self, size_class: int, now: float, *, for_all: bool) -> list[WorkerSlot]:
        """Groups of a size class that its samples in flight cannot keep busy, first whom it costs least to let go; `for_all`
        that have been idle for long, whatever keeps samples from them.
        """
        slots = self._slots[size_class]
        waiting = [slot for slot in slots if _is_waiting(slot)]
        idle = [slot for slot in slots if now - self._idle.get(slot.id, now) >= LOAD_S]
        too_many = max(0, _alive(slots) - self._needed[size_class])
        return [*waiting[:too_many], *idle] if for_all else (waiting + idle)[:too_many]

    def _left(self) -> int:
        """Ranks of the budget that no group holds."""
        return self._budget - sum(
            size.ranks * _alive(of) for size, of in zip(self._size_classes, self._slots, strict=True)
        )


def _alive(slots: Sequence[WorkerSlot]) -> int:
    return sum(slot.alive for slot in slots)


def _is_waiting(slot: WorkerSlot) -> bool:
    """Whether it has been asked for and has found no room yet."""
    return slot.status is Status.STARTING and not slot.placed


def _may_start(slot: WorkerSlot, now: float) -> bool:
    return slot.status is Status.ABSENT and now >= slot.start_at
