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
from hv_batch.job.scheduling.workers.stage_slots import StageSlots
from hv_batch.job.scheduling.workers.worker_slots import Status, WorkerSlot

LOAD_S = 120.0  # from the start of a group to its first step: 26 GB of weights on each rank, and the rendezvous
MAX_WAIT_S = 1800.0
PLACE_S = 30.0  # ranks freed for a claim are taken within seconds; if they were not enough, more are freed


class SizeClassSlots:
    """The slots of one stage, by size class.

    The methods that yield slots do not change them. The caller must start, or end, each slot before it takes the next.
    """

    def __init__(self, size_classes: Sequence[SizeClass], slots: StageSlots) -> None:
        self._size_classes = size_classes
        self._classes = range(len(size_classes))
        self._slots = slots
        self._budget = max(size_class.ranks * size_class.workers for size_class in size_classes)
        self._needed: Sequence[int] = [0] * len(size_classes)
        self._lacking: dict[int, float] = {}  # since when a size class has had samples and no placed group
        self._claim: int | None = None
        self._freed = (0.0, 0)  # for the claim: the time of the last release, and the ranks released

    def __len__(self) -> int:
        return len(self._size_classes)

    def update(self, needed: Sequence[int], now: float) -> None:
        """Set how many groups of each size class the samples in flight can keep busy."""
        self._needed = needed
        if len(self._size_classes) == 1:
            return
        lacking = [each for each in self._classes if needed[each] and not self._slots.placed(each)]
        self._lacking = {size_class: self._lacking.get(size_class, now) for size_class in lacking}
        if self._claim not in self._lacking:
            first = min(self._lacking, key=self._lacking.__getitem__, default=None)
            is_due = first is not None and now - self._lacking[first] >= MAX_WAIT_S
            self._claim, self._freed = (first if is_due else None), (now, 0)

    def abandoned(self) -> int | None:
        """A size class with samples in flight of which every slot is abandoned, or None."""
        for size_class, size in enumerate(self._size_classes):
            if self._needed[size_class] and self._slots.count(Status.ABANDONED, size_class) == size.workers:
                return size_class
        return None

    def needed(self, size_class: int) -> int:
        """How many groups of the size class its samples in flight can keep busy."""
        return self._needed[size_class]

    def starts(self, most: int, now: float) -> Iterator[WorkerSlot]:
        """The slots that should start, while fewer than `most` groups are alive."""
        while self._slots.alive() < most:
            growing = {
                size_class: slot
                for size_class in self._classes
                if self._may_grow(size_class) and (slot := self._slots.first_startable(size_class, now))
            }
            if not growing:
                return
            yield growing[max(growing, key=self._urgency)]

    def to_come(self, most: int) -> list[int]:
        """How many slots of each size class would start if none had to pause after a loss."""
        room = most - self._slots.alive()
        counts = []
        for size_class, size in enumerate(self._size_classes):
            missing = self._needed[size_class] - self._slots.alive(size_class)
            absent = self._slots.count(Status.ABSENT, size_class)
            wanted = min(missing, absent, self._free_ranks() // size.ranks, room)
            counts.append(max(0, wanted) if self._claim in (None, size_class) else 0)
        return counts

    def _may_grow(self, size_class: int) -> bool:
        is_short = self._needed[size_class] > self._slots.alive(size_class)
        has_ranks = self._size_classes[size_class].ranks <= self._free_ranks()
        return is_short and has_ranks and self._claim in (None, size_class)

    def _urgency(self, size_class: int) -> tuple[bool, float]:
        alive = self._slots.alive(size_class)
        return not alive, self._needed[size_class] / (alive + 1)

    def exchanges(self, now: float) -> Iterator[WorkerSlot]:
        """The slots whose groups should be released in favour of another size class."""
        if self._claim is not None:
            yield from self._serve_claim(self._claim, now)
        elif len(self._size_classes) > 1:
            for size_class in self._classes:
                yield from self._exchange_idle(size_class, now)

    def _serve_claim(self, claim: int, now: float) -> Iterator[WorkerSlot]:
        """Groups of other sizes that are not placed yet, which would take the freed ranks, and idle ones as needed."""
        if not (self._slots.count(Status.REQUESTED, claim) or self._slots.first_startable(claim, now)):
            return
        others = [size_class for size_class in self._classes if size_class != claim]
        for size_class in others:
            yield from self._slots.having((Status.REQUESTED,), size_class)
        when, freed = self._freed
        wanted = self._size_classes[claim].ranks
        if freed >= wanted and now - when >= PLACE_S:
            freed = 0
        for slot in [slot for other in others for slot in self._slots.having((Status.IDLE,), other)]:
            has_room = not self._slots.alive(claim) and self._free_ranks() >= wanted
            if freed >= wanted or has_room:
                return
            freed += self._size_classes[slot.size_class].ranks
            self._freed = (now, freed)
            yield slot

    def _exchange_idle(self, size_class: int, now: float) -> Iterator[WorkerSlot]:
        """Groups that have been idle for long, if they free all the ranks that a group of `size_class` lacks."""
        if (missing := self._missing_ranks(size_class, now)) <= 0:
            return
        others = [other for other in self._classes if other != size_class]
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
        ranks = self._size_classes[size_class].ranks
        if now - self._slots.first_request(size_class) >= LOAD_S:
            return ranks  # within the budget, but the cluster does not have that many
        if self._slots.count(Status.REQUESTED, size_class):
            return 0
        is_short = self._needed[size_class] > self._slots.alive(size_class)
        may_grow = is_short and self._slots.first_startable(size_class, now) is not None
        return ranks - self._free_ranks() if may_grow else 0

    def _spare(self, size_class: int, now: float, *, include_needed: bool) -> list[WorkerSlot]:
        """Groups of a size class that its samples in flight cannot keep busy, the cheapest to release first.

        With `include_needed`, all groups that have been idle for long, whatever their samples wait for.
        """
        too_many = max(0, self._slots.alive(size_class) - self._needed[size_class])
        if not (too_many or include_needed):
            return []
        unplaced = self._slots.having((Status.REQUESTED,), size_class)
        idle = [slot for slot in self._slots.having((Status.IDLE,), size_class) if now - slot.idle_since >= LOAD_S]
        return [*unplaced[:too_many], *idle] if include_needed else (unplaced + idle)[:too_many]

    def _free_ranks(self) -> int:
        """Ranks of the budget that no group holds."""
        return self._budget - sum(size.ranks * self._slots.alive(each) for each, size in enumerate(self._size_classes))
