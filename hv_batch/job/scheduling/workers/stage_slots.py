"""The worker slots of one stage, indexed by status, so that no step of the scheduler looks at all of them.

With 1,024 denoise groups, a scan of all slots in each step takes most of the scheduler's time. Each slot reports its
changes here (`WorkerSlot.on_change`). Lists are sorted by slot number, so results have the order of a scan.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

from hv_batch.job.scheduling.limits import SizeClass
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.scheduling.workers.worker_slots import ALIVE, PLACED, READY, Status, WorkerSlot
from hv_batch.job.stages import Stage

RELEASABLE = (Status.REQUESTED, Status.LOADING, Status.IDLE)  # without a task, the cheapest to release first

Turn = tuple[float, int]  # a time and a slot number, by which slots are sorted
T = TypeVar("T", int, Turn)


class StageSlots:
    """The slots of `stage`, with increasing numbers from one size class to the next.

    Methods that take an optional size class look at all size classes if it is None.
    """

    def __init__(self, stage: Stage, size_classes: Sequence[SizeClass]) -> None:
        self._classes = range(len(size_classes))
        self._slots: list[WorkerSlot] = []
        self._numbers: list[dict[Status, list[int]]] = [{status: [] for status in Status} for _ in size_classes]
        self._requests: list[list[Turn]] = [[] for _ in size_classes]  # requested slots by time of the request
        self._turns: list[list[Turn]] = [[] for _ in size_classes]  # idle slots in the order in which they get tasks
        self._startable: list[list[int]] = [[] for _ in size_classes]  # absent slots of which no pause is known
        self._paused: list[list[Turn]] = [[] for _ in size_classes]  # heaps of absent slots by the end of their pause
        self._alive, self._placed, self._ready = (Counter[int | None]() for _ in range(3))  # None: of all size classes
        self._filed: list[tuple[Status, Turn]] = []  # by slot number: where it is in the lists above
        for size_class, size in enumerate(size_classes):
            for _ in range(size.workers):
                self._add(WorkerSlot(WorkerId(stage, len(self._slots), 0), size_class))

    def _add(self, slot: WorkerSlot) -> None:
        number = slot.id.slot
        self._slots.append(slot)
        self._numbers[slot.size_class][Status.ABSENT].append(number)
        self._startable[slot.size_class].append(number)
        self._filed.append((Status.ABSENT, (slot.start_at, number)))

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[WorkerSlot]:
        return iter(self._slots)

    def __getitem__(self, number: int) -> WorkerSlot:
        return self._slots[number]

    def alive(self, size_class: int | None = None) -> int:
        """How many workers are requested or exist."""
        return self._alive[size_class]

    def placed(self, size_class: int | None = None) -> int:
        """How many workers hold their resources, loaded or not."""
        return self._placed[size_class]

    def ready(self, size_class: int | None = None) -> int:
        """How many workers are idle or busy."""
        return self._ready[size_class]

    def count(self, status: Status, size_class: int | None = None) -> int:
        if size_class is not None:
            return len(self._numbers[size_class][status])
        return sum([len(numbers[status]) for numbers in self._numbers])

    def having(self, statuses: Sequence[Status], size_class: int | None = None) -> list[WorkerSlot]:
        """The slots with one of the statuses, in the order of `statuses`, then of their numbers."""
        classes = self._classes if size_class is None else (size_class,)
        return [
            self._slots[number] for status in statuses for each in classes for number in self._numbers[each][status]
        ]

    def first_request(self, size_class: int | None = None) -> float:
        """When the resources were requested for which a slot has waited longest; inf if none waits."""
        requests = self._requests if size_class is None else [self._requests[size_class]]
        return min([each[0][0] for each in requests if each], default=math.inf)

    def idle_in_turn(self, without: Collection[int] = ()) -> Iterator[WorkerSlot]:
        """The idle slots, in the order in which they get tasks, except those of the size classes `without`.

        Slots of a single size class are ordered by number. Slots of several size classes take turns, so that one size
        does not leave another idle. The caller may give a slot a task, or change `without`, before it takes the next.
        """
        turn: Turn = (-math.inf, -1)
        while True:
            following = []
            for size_class, turns in enumerate(self._turns):
                if size_class not in without and (index := bisect_right(turns, turn)) < len(turns):
                    following.append(turns[index])
            if not following:
                return
            turn = min(following)
            yield self._slots[turn[1]]

    def first_startable(self, size_class: int, now: float) -> WorkerSlot | None:
        """The first absent slot of a size class whose pause has ended, or None."""
        startable = self._startable_now(size_class, now)
        return self._slots[startable[0]] if startable else None

    def startable(self, most: int, count: int, now: float) -> list[WorkerSlot]:
        """At most `count` absent slots whose pause has ended, of the first `most` slots that are not abandoned.

        Only for a stage without sizes.
        """
        startable = self._startable_now(0, now)
        end = bisect_left(startable, self._end_of_first(most))
        return [self._slots[number] for number in startable[: min(end, count)]]

    def _end_of_first(self, most: int) -> int:
        """The number after the first `most` slots that are not abandoned."""
        abandoned, end = self._numbers[0][Status.ABANDONED], most
        while (further := most + bisect_left(abandoned, end)) != end:
            end = further
        return end

    def _startable_now(self, size_class: int, now: float) -> list[int]:
        paused, startable = self._paused[size_class], self._startable[size_class]
        while paused and paused[0][0] <= now:
            turn = heapq.heappop(paused)
            number = turn[1]
            # A slot that has started since then, or has another pause, is filed under another turn.
            if self._filed[number] == (Status.ABSENT, turn):
                index = bisect_left(startable, number)
                if index == len(startable) or startable[index] != number:
                    startable.insert(index, number)
        return startable

    def file(self, slot: WorkerSlot) -> None:
        """Update the index after a change of `slot`."""
        number, size_class, status = slot.id.slot, slot.size_class, slot.status
        filed = (status, (self._time(slot), number))
        before = self._filed[number]
        if filed == before:
            return
        self._filed[number] = filed
        self._remove(before, size_class)
        if status is not before[0]:
            insort(self._numbers[size_class][status], number)
            for statuses, counts in ((ALIVE, self._alive), (PLACED, self._placed), (READY, self._ready)):
                if change := (status in statuses) - (before[0] in statuses):
                    counts[size_class] += change
                    counts[None] += change
        if status is Status.REQUESTED:
            insort(self._requests[size_class], filed[1])
        elif status is Status.IDLE:
            insort(self._turns[size_class], filed[1])
        elif status is Status.ABSENT:
            heapq.heappush(self._paused[size_class], filed[1])

    def _remove(self, filed: tuple[Status, Turn], size_class: int) -> None:
        status, turn = filed
        if self._slots[turn[1]].status is not status:
            _remove_sorted(self._numbers[size_class][status], turn[1])
        if status is Status.REQUESTED:
            _remove_sorted(self._requests[size_class], turn)
        elif status is Status.IDLE:
            _remove_sorted(self._turns[size_class], turn)
        elif status is Status.ABSENT:
            _remove_sorted(self._startable[size_class], turn[1])

    def _time(self, slot: WorkerSlot) -> float:
        """The time by which a slot of its status is sorted."""
        if slot.status is Status.REQUESTED:
            return slot.requested_at
        if slot.status is Status.ABSENT:
            return slot.start_at
        if slot.status is Status.IDLE and len(self._classes) > 1:
            return slot.last_heartbeat_at
        return 0.0


def _remove_sorted(values: list[T], value: T) -> None:
    """Remove `value` from a sorted list if it is there."""
    index = bisect_left(values, value)
    if index < len(values) and values[index] == value:
        del values[index]
