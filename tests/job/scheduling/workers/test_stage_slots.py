"""job.scheduling.workers: the index of worker slots and the watch of tasks agree with a scan of all slots."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.limits import SizeClass, StageLimits
from hv_batch.job.scheduling.workers.stage_slots import RELEASABLE, StageSlots
from hv_batch.job.scheduling.workers.task_watch import TaskWatch
from hv_batch.job.scheduling.workers.worker_slots import ALIVE, PLACED, READY, Status
from hv_batch.job.stages import Stage

TIMEOUT_S = 50.0
CHANGES = {
    Status.ABSENT: ("start", "pause"),
    Status.REQUESTED: ("placed", "ready", "postpone", "end", "lose", "leave"),
    Status.LOADING: ("ready", "end", "lose", "leave"),
    Status.IDLE: ("run", "run", "heartbeat", "end", "lose", "leave"),
    Status.BUSY: ("done", "done", "heartbeat", "lose", "leave"),
    Status.ABANDONED: (),
}


def change(slot, what, draw, now):
    match what:
        case "start":
            slot.start(now)
        case "pause":
            slot.pause_until(now + draw(st.sampled_from([0.0, 5.0, 30.0])))
        case "placed":
            slot.note_placed()
        case "ready":
            slot.become_ready(now)
        case "postpone":
            slot.postpone_request(now - 10.0)
        case "run":
            slot.run(("s",), now)
        case "heartbeat":
            slot.note_heartbeat(draw(st.sampled_from([math.inf, 3.0, 20.0])), now)
        case "done":
            slot.complete_task(now)
        case "end":
            slot.end()
        case "lose":
            slot.lose(Failure(FailureClass.INFRA, "died"), now, 2)
        case "leave":
            slot.leave(now + 120.0, now)


def check(slots, size_classes, now):
    for size_class in (None, *range(size_classes)):
        chosen = [slot for slot in slots if size_class in (None, slot.size_class)]
        for statuses, count in ((ALIVE, slots.alive), (PLACED, slots.placed), (READY, slots.ready)):
            assert count(size_class) == sum(slot.status in statuses for slot in chosen)
        assert [slots.count(each, size_class) for each in Status] == [
            sum(slot.status is each for slot in chosen) for each in Status
        ]
        releasable = sorted((slot for slot in chosen if slot.status in RELEASABLE), key=lambda slot: slot.status)
        assert slots.having(RELEASABLE, size_class) == releasable
        requests = [slot.requested_at for slot in chosen if slot.status is Status.REQUESTED]
        assert slots.first_request(size_class) == min(requests, default=math.inf)
    idle = [slot for slot in slots if slot.status is Status.IDLE]
    turn = (lambda slot: slot.last_heartbeat_at) if size_classes > 1 else (lambda _slot: 0.0)
    assert list(slots.idle_in_turn()) == sorted(idle, key=turn)
    assert list(slots.idle_in_turn({0})) == sorted((slot for slot in idle if slot.size_class), key=turn)
    may_start = [slot for slot in slots if slot.status is Status.ABSENT and now >= slot.start_at]
    for size_class in range(size_classes):
        first = next((slot for slot in may_start if slot.size_class == size_class), None)
        assert slots.first_startable(size_class, now) is first
    if size_classes == 1:
        usable = [slot for slot in slots if slot.status is not Status.ABANDONED][:3]
        assert slots.startable(3, 2, now) == [slot for slot in usable if slot in may_start][:2]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_index_agrees_with_a_scan_of_all_slots(data):
    """P5, P7: whatever happens to the workers, the scheduler finds the slots that a scan would find, in that order."""
    size_classes = data.draw(st.sampled_from([1, 1, 3]))
    sizes = [SizeClass(ranks=1, workers=data.draw(st.integers(1, 6)), ahead=1) for _ in range(size_classes)]
    slots = StageSlots(Stage.DENOISE, sizes)
    watch = TaskWatch({Stage.DENOISE: StageLimits(workers=1, ahead=1, task_timeout_s=TIMEOUT_S)})
    for slot in slots:
        slot.on_change = lambda slot: (slots.file(slot), watch.note(slot))
    now = 0.0
    for _ in range(data.draw(st.integers(0, 40))):
        now += data.draw(st.sampled_from([0.0, 1.0, 4.0, 60.0]))
        slot = data.draw(st.sampled_from(list(slots)))
        if changes := CHANGES[slot.status]:
            change(slot, data.draw(st.sampled_from(changes)), data.draw, now)
        if data.draw(st.booleans()):
            check(slots, size_classes, now)
            busy = [slot for slot in slots if slot.status is Status.BUSY]
            hung = [s for s in busy if now - s.last_heartbeat_at > min(TIMEOUT_S, s.next_within_s)]
            assert watch.hung(now) == hung
            assert watch.leaving() == [slot for slot in slots if slot.leaving_at is not None]
            for slot in hung:
                slot.end_task(now)
