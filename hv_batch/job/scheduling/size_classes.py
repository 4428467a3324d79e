"""Size classes: groups of several sizes, the size of the next group, and the exchange of groups between sizes.

Each group size is a size class with its own worker slots and queue. All size classes share one budget of ranks, which
the living groups never exceed. A new group goes to a size class that has none, else to the one with the most samples
for each group. Sizes are chosen so that a sample takes about as long in each size class, so the queues end together.

A new group takes minutes to load, so an existing one is released for another size class only in two cases:

- The group has been idle for as long as a load takes. Waiting longer costs more than to load again, and waiting less
  costs more if a sample arrives: at most twice the cost of the optimal offline choice (ski-rental bound). Besides, its
  size class has fewer samples in flight than groups, or the other size class has no group at all, and together with
  other such groups it frees all the ranks that are needed.
- A size class has had samples and no group for MAX_WAIT_S. It then gets a claim: no other size class gets a group, and
  each of their groups is released when its sample ends, until the claim is satisfied. So no size class starves while
  another has an endless supply. An exchange, with the minutes until the ranks of a large group are free, stays a small
  part of the time between two exchanges.

With one size class, groups start as needed and are never exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hv_batch.job.scheduling.limits import SizeClass
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.scheduling.worker_slots import Status, WorkerSlot

LOAD_S = 120.0  # from the start of a group to its first step: 26 GB of weights on each rank, and the rendezvous
MAX_WAIT_S = 1800.0
PLACE_S = 30.0  # ranks freed for a claim are taken within seconds; if they were not enough, more are freed


class SizeClassSlots:
    """The slots of one stage, by size class.

    The methods that yield slots do not change them. The caller must start, or end, each slot before it takes the next.
    """

    def __init__(self, size_classes: Sequence[SizeClass], slots: Sequence[WorkerSlot]) -> None:
        self._size_classes = size_classes
        self._slots = [
            [slot for slot in slots if slot.size_class == size_class] for size_class in range(len(size_classes))
        ]
        self._budget = max(size_class.ranks * size_class.workers for size_class in size_classes)
        self._needed: Sequence[int] = [0] * len(size_classes)
        self._lacking: dict[int, float] = {}  # since when a size class has had samples and no placed group
        self._idle: dict[WorkerId, float] = {}  # since when a group has been idle
        self._claim: int | None = None
        self._freed = (0.0, 0)  # for the claim: the time of the last release, and the ranks released

    def __len__(self) -> int:
        return len(self._size_classes)

    def update(self, needed: Sequence[int], now: float) -> None:
        """Set how many groups of each size class the samples in flight can keep busy."""
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
            is_due = first is not None and now - self._lacking[first] >= MAX_WAIT_S
            self._claim, self._freed = (first if is_due else None), (now, 0)

    def abandoned(self) -> int | None:
        """A size class with samples in flight of which every slot is abandoned, or None."""
        for size_class, slots in enumerate(self._slots):
            if self._needed[size_class] and all(slot.status is Status.ABANDONED for slot in slots):
                return size_class
        return None

    def shares(self) -> Iterator[tuple[list[WorkerSlot], int]]:
        """The slots of each size class, and how many of them its samples in flight can keep busy."""
        yield from zip(self._slots, self._needed, strict=True)

    def starts(self, most: int, now: float) -> Iterator[WorkerSlot]:
        """The slots that should start, while fewer than `most` groups are alive."""
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
        counts = []
        for size_class, (size, slots) in enumerate(zip(self._size_classes, self._slots, strict=True)):
            absent = sum(slot.status is Status.ABSENT for slot in slots)
            wanted = min(self._needed[size_class] - _alive(slots), absent, self._free_ranks() // size.ranks, room)
            counts.append(max(0, wanted) if self._claim in (None, size_class) else 0)
        return counts

    def _may_grow(self, size_class: int) -> bool:
        is_short = self._needed[size_class] > _alive(self._slots[size_class])
        has_ranks = self._size_classes[size_class].ranks <= self._free_ranks()
        return is_short and has_ranks and self._claim in (None, size_class)

    def _urgency(self, size_class: int) -> tuple[bool, float]:
        alive = _alive(self._slots[size_class])
        return not alive, self._needed[size_class] / (alive + 1)

    def exchanges(self, now: float) -> Iterator[WorkerSlot]:
        """The slots whose groups should be released in favour of another size class."""
        if self._claim is not None:
            yield from self._serve_claim(self._claim, now)
        elif len(self._size_classes) > 1:
            for size_class in range(len(self._size_classes)):
                yield from self._exchange_idle(size_class, now)

    def _serve_claim(self, claim: int, now: float) -> Iterator[WorkerSlot]:
        """Groups of other sizes that are not placed yet, which would take the freed ranks, and idle ones as needed."""
        others = [slot for slots in self._slots for slot in slots if slot.size_class != claim]
        if not any(_is_unplaced(slot) or _may_start(slot, now) for slot in self._slots[claim]):
            return
        yield from [slot for slot in others if _is_unplaced(slot)]
        when, freed = self._freed
        wanted = self._size_classes[claim].ranks
        if freed >= wanted and now - when >= PLACE_S:
            freed = 0
        for slot in [slot for slot in others if slot.status is Status.IDLE]:
            has_room = not _alive(self._slots[claim]) and self._free_ranks() >= wanted
            if freed >= wanted or has_room:
                return
            freed += self._size_classes[slot.size_class].ranks
            self._freed = (now, freed)
            yield slot

    def _exchange_idle(self, size_class: int, now: float) -> Iterator[WorkerSlot]:
        """Groups that have been idle for long, if they free all the ranks that a group of `size_class` lacks."""
        if (missing := self._missing_ranks(size_class, now)) <= 0:
            return
        others = [other for other in range(len(self._size_classes)) if other != size_class]
        has_none = size_class in self._lacking
        spare = [slot for other in others for slot in self._spare(other, now, include_needed=has_none)]
        if sum(self._size_classes[slot.size_class].ranks for slot in spare) < missing:
            return
        for slot in spare:
            if missing <= 0:
                return
            missing -= self._size_classes[slot.size_class].ranks
            yield slot

    def _missing_ranks(self, size_class: int, now: float) -> int:
        """The ranks that the next group of a size class lacks."""
        slots, ranks = self._slots[size_class], self._size_classes[size_class].ranks
        unplaced = [slot for slot in slots if _is_unplaced(slot)]
        if any(now - slot.requested_at >= LOAD_S for slot in unplaced):
            return ranks  # within the budget, but the cluster does not have that many
        may_grow = self._needed[size_class] > _alive(slots) and any(_may_start(slot, now) for slot in slots)
        return ranks - self._free_ranks() if may_grow and not unplaced else 0

    def _spare(self, size_class: int, now: float, *, include_needed: bool) -> list[WorkerSlot]:
        """Groups of a size class that its samples in flight cannot keep busy, the cheapest to release first.

        With `include_needed`, all groups that have been idle for long, whatever their samples wait for.
        """
        slots = self._slots[size_class]
        unplaced = [slot for slot in slots if _is_unplaced(slot)]
        idle = [slot for slot in slots if now - self._idle.get(slot.id, now) >= LOAD_S]
        too_many = max(0, _alive(slots) - self._needed[size_class])
        return [*unplaced[:too_many], *idle] if include_needed else (unplaced + idle)[:too_many]

    def _free_ranks(self) -> int:
        """Ranks of the budget that no group holds."""
        return self._budget - sum(
            size.ranks * _alive(slots) for size, slots in zip(self._size_classes, self._slots, strict=True)
        )


def _alive(slots: Sequence[WorkerSlot]) -> int:
    return sum(slot.alive for slot in slots)


def _is_unplaced(slot: WorkerSlot) -> bool:
    """Whether the worker is requested and not placed yet."""
    return slot.status is Status.STARTING and not slot.placed


def _may_start(slot: WorkerSlot, now: float) -> bool:
    return slot.status is Status.ABSENT and now >= slot.start_at
