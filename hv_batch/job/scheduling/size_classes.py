"""Groups of several sizes: which size the next group has, and which group makes room for one of another size.

Every size is a lane, with worker slots and waiting samples of its own. What the lanes share is a budget of ranks, which
the groups that live never exceed together. A new group goes to a lane that has none, else to where most samples wait
for each group; sizes are chosen so that a sample takes about as long in every lane, so this evens out when they end.

A group that exists is worth keeping: another takes minutes to load. So it is let go for another lane only when

- it has been idle for as long as a load takes (to wait longer costs more than to load again, to wait less costs more
  when a sample comes: at worst twice what a prophet would have paid), its lane has fewer samples in flight than groups
  or the other lane has no group at all, and with others like it, it makes all the room that is wanted; or
- a lane has had samples and no group at all for PATIENCE_S. Then this lane has a claim: no other gets a group, and
  each of theirs goes when it has ended its sample, until the claim has found its place. So no lane starves while
  another has an endless supply, and a switch, with the minutes until a large group's ranks are gathered, stays a small
  part of the time between two.

Only one lane: groups come as they are needed, and never make room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hv_batch.job.scheduling.limits import Lane
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.scheduling.worker_slots import Status, WorkerSlot

LOAD_S = 120.0  # what a group takes until it renders: 26 GB of weights on every rank, and to meet
PATIENCE_S = 1800.0
PLACE_S = 30.0  # what is freed for a claim is taken within seconds; if that was too little, more is freed


class Lanes:
    """The slots of one station, by lane.

    Slots are changed by the caller: what is yielded must have started, or ended, before the next is asked for.
    """

    def __init__(self, lanes: Sequence[Lane], slots: Sequence[WorkerSlot]) -> None:
        self._lanes = lanes
        self._slots = [[slot for slot in slots if slot.lane == lane] for lane in range(len(lanes))]
        self._budget = max(lane.ranks * lane.workers for lane in lanes)
        self._needed: Sequence[int] = [0] * len(lanes)
        self._lacking: dict[int, float] = {}  # lanes with samples and no group that has its place; since when
        self._idle: dict[WorkerId, float] = {}  # since when
        self._claim: int | None = None
        self._freed = (0.0, 0)  # for the claim: when the last time, how many ranks

    def __len__(self) -> int:
        return len(self._lanes)

    def note(self, needed: Sequence[int], now: float) -> None:
        """How many groups of each lane could be busy with what is in flight."""
        self._needed = needed
        if len(self._lanes) == 1:
            return
        idle = [slot.id for slots in self._slots for slot in slots if slot.status is Status.IDLE]
        self._idle = {worker: self._idle.get(worker, now) for worker in idle}
        lacking = [lane for lane, slots in enumerate(self._slots) if needed[lane] and not any(s.placed for s in slots)]
        self._lacking = {lane: self._lacking.get(lane, now) for lane in lacking}
        if self._claim not in self._lacking:
            first = min(self._lacking, key=self._lacking.__getitem__, default=None)
            is_due = first is not None and now - self._lacking[first] >= PATIENCE_S
            self._claim, self._freed = (first if is_due else None), (now, 0)

    def given_up(self) -> int | None:
        """A lane that is needed and has no slot left that will ever start again."""
        for lane, slots in enumerate(self._slots):
            if self._needed[lane] and all(slot.status is Status.ABANDONED for slot in slots):
                return lane
        return None

    def shares(self) -> Iterator[tuple[list[WorkerSlot], int]]:
        """The slots of each lane, with how many of them its samples in flight can keep busy."""
        yield from zip(self._slots, self._needed, strict=True)

    def starts(self, most: int, now: float) -> Iterator[WorkerSlot]:
        """The slots that should start, while fewer than `most` live."""
        absent = [[slot for slot in slots if _may_start(slot, now)] for slots in self._slots]
        while sum(map(_alive, self._slots)) < most:
            lanes = [lane for lane in range(len(self._lanes)) if absent[lane] and self._may_grow(lane)]
            if not lanes:
                return
            yield absent[max(lanes, key=self._urgency)].pop(0)

    def to_come(self, most: int) -> list[int]:
        """How many slots of each lane would start if none had to pause after a loss."""
        room = most - sum(map(_alive, self._slots))
        found = []
        for lane, (size, slots) in enumerate(zip(self._lanes, self._slots, strict=True)):
            absent = sum(slot.status is Status.ABSENT for slot in slots)
            wanted = min(self._needed[lane] - _alive(slots), absent, self._left() // size.ranks, room)
            found.append(max(0, wanted) if self._claim in (None, lane) else 0)
        return found

    def _may_grow(self, lane: int) -> bool:
        is_short = self._needed[lane] > _alive(self._slots[lane])
        return is_short and self._lanes[lane].ranks <= self._left() and self._claim in (None, lane)

    def _urgency(self, lane: int) -> tuple[bool, float]:
        alive = _alive(self._slots[lane])
        return not alive, self._needed[lane] / (alive + 1)

    def trades(self, now: float) -> Iterator[WorkerSlot]:
        """The slots whose groups are to make room for another lane."""
        if self._claim is not None:
            yield from self._make_room(self._claim, now)
        elif len(self._lanes) > 1:
            for lane in range(len(self._lanes)):
                yield from self._swap(lane, now)

    def _make_room(self, claim: int, now: float) -> Iterator[WorkerSlot]:
        """Whoever waits for room elsewhere would take it; whoever has ended a sample may go."""
        others = [slot for slots in self._slots for slot in slots if slot.lane != claim]
        if not any(_is_waiting(slot) or _may_start(slot, now) for slot in self._slots[claim]):
            return
        yield from [slot for slot in others if _is_waiting(slot)]
        when, freed = self._freed
        wanted = self._lanes[claim].ranks
        if freed >= wanted and now - when >= PLACE_S:
            freed = 0
        for slot in [slot for slot in others if slot.status is Status.IDLE]:
            has_room = not _alive(self._slots[claim]) and self._left() >= wanted
            if freed >= wanted or has_room:
                return
            freed += self._lanes[slot.lane].ranks
            self._freed = (now, freed)
            yield slot

    def _swap(self, lane: int, now: float) -> Iterator[WorkerSlot]:
        """Groups that have had nothing to do for long, for one that would have: all it takes, or none."""
        if (short := self._short(lane, now)) <= 0:
            return
        others = [other for other in range(len(self._lanes)) if other != lane]
        spare = [slot for other in others for slot in self._spare(other, now, for_all=lane in self._lacking)]
        if sum(self._lanes[slot.lane].ranks for slot in spare) < short:
            return
        for slot in spare:
            if short <= 0:
                return
            short -= self._lanes[slot.lane].ranks
            yield slot

    def _short(self, lane: int, now: float) -> int:
        """The ranks that the next group of a lane lacks."""
        slots, ranks = self._slots[lane], self._lanes[lane].ranks
        waiting = [slot for slot in slots if _is_waiting(slot)]
        if any(now - slot.asked_at >= LOAD_S for slot in waiting):
            return ranks  # it is within the budget, but the cluster has not as many
        may_grow = self._needed[lane] > _alive(slots) and any(_may_start(slot, now) for slot in slots)
        return ranks - self._left() if may_grow and not waiting else 0

    def _spare(self, lane: int, now: float, *, for_all: bool) -> list[WorkerSlot]:
        """Groups of a lane that its samples in flight cannot keep busy, first whom it costs least to let go; `for_all`
        that have been idle for long, whatever keeps samples from them.
        """
        slots = self._slots[lane]
        waiting = [slot for slot in slots if _is_waiting(slot)]
        idle = [slot for slot in slots if now - self._idle.get(slot.id, now) >= LOAD_S]
        too_many = max(0, _alive(slots) - self._needed[lane])
        return [*waiting[:too_many], *idle] if for_all else (waiting + idle)[:too_many]

    def _left(self) -> int:
        """Ranks of the budget that no group holds."""
        return self._budget - sum(size.ranks * _alive(of) for size, of in zip(self._lanes, self._slots, strict=True))


def _alive(slots: Sequence[WorkerSlot]) -> int:
    return sum(slot.alive for slot in slots)


def _is_waiting(slot: WorkerSlot) -> bool:
    """Whether it has been asked for and has found no room yet."""
    return slot.status is Status.STARTING and not slot.placed


def _may_start(slot: WorkerSlot, now: float) -> bool:
    return slot.status is Status.ABSENT and now >= slot.start_at
