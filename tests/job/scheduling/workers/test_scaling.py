"""hv_batch.job.scheduling.workers.scaling: workers on draining nodes, and the number of workers."""

from __future__ import annotations

import math

import pytest

from hv_batch.job.failure import FailureClass
from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import Admitted, Finish, TaskDone, WorkerLeaving, WorkerPlaced
from hv_batch.job.scheduling.workers.scaling import MAKE_ROOM_EVERY_S, STARVED_AFTER_S
from hv_batch.job.scheduling.workers.worker_slots import END_MARGIN_S, LAST_CHECKPOINT_S
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import World, advance, limits, pass_time, plan_of


def group_of(world):
    return next((worker for worker in world.running if worker.stage is Stage.DENOISE), None)


def a_group_renders(world):
    return group_of(world) is not None


def only_denoising(world):
    return a_group_renders(world) and not world.starting and {w.stage for w in world.running} == {Stage.DENOISE}


@pytest.mark.parametrize("what", ["starting", "idle"])
def test_a_worker_without_a_task_leaves_at_once(what):
    """P5: its slot starts again on another node, and the loss counts against neither the slot nor a sample."""
    world = World(limits(groups=1), plan_of(2))
    group = next(worker for worker in world.starting if worker.stage is Stage.DENOISE)
    if what == "idle":
        world.ready(group)
    world.leave(group, 120.0)
    assert world.killed[group].kind is FailureClass.PREEMPTED
    assert [w for w in world.starting if w.stage is Stage.DENOISE] == [type(group)(Stage.DENOISE, 0, 1)]


def test_a_task_may_finish_before_its_node_goes_away():
    """P4: no work is lost and no sample charged; the group gets no further sample and ends after its task."""
    world = World(limits(groups=1), plan_of(2))
    advance(world, only_denoising)
    group = group_of(world)
    world.leave(group, 120.0)
    assert world.checkpoints == [group]
    pass_time(world, 60.0)
    world.done(group)
    assert world.killed[group].kind is FailureClass.PREEMPTED
    world.run_to_end()
    assert world.runs[Stage.DENOISE, "s0"] == 1
    assert sorted(world.committed) == ["s0", "s1"]


def test_a_task_that_cannot_finish_is_ended_in_time():
    """P4, P5: one checkpoint at the notice and one near the end; then the sample is requeued, charged one PREEMPTED."""
    world = World(limits(groups=1), plan_of(3))
    advance(world, only_denoising)
    group = group_of(world)
    (key,) = world.running[group]
    world.leave(group, 120.0)
    pass_time(world, 30.0)
    assert world.checkpoints == [group]
    world.feed(WorkerLeaving(group, 120.0))  # the runtime repeats the event at each poll
    pass_time(world, 90.0 - LAST_CHECKPOINT_S)
    assert world.checkpoints == [group, group]
    pass_time(world, LAST_CHECKPOINT_S - END_MARGIN_S - 1.0)
    assert group in world.running
    world.tick(1.0)
    assert world.killed[group].kind is FailureClass.PREEMPTED
    assert [failure.kind for failure in world.scheduler.failures(key)] == [FailureClass.PREEMPTED]
    assert world.checkpoints == [group, group]
    world.run_to_end()
    assert len(world.committed) == 3


def test_a_node_that_goes_away_early_is_a_preemption():
    """P5: the loss of a group on a draining node is PREEMPTED, whatever failure the ranks report."""
    world = World(limits(groups=1), plan_of(1))
    advance(world, only_denoising)
    group = group_of(world)
    world.leave(group, 120.0)
    world.lost(group, FailureClass.INFRA)
    assert world.killed[group].kind is FailureClass.PREEMPTED
    assert [failure.kind for failure in world.scheduler.failures("s0")] == [FailureClass.PREEMPTED]


def test_preemptions_never_use_up_a_slot():
    """P5: a worker slot that loses its node twenty times in a row starts a twenty-first time."""
    world = World(limits(groups=1), plan_of(1))
    for _ in range(20):
        advance(world, lambda world: any(w.stage is Stage.DENOISE for w in world.starting))
        world.leave(next(w for w in world.starting if w.stage is Stage.DENOISE), math.inf)
    world.run_to_end()
    assert world.committed == ["s0"]


def test_the_tail_releases_workers_that_are_not_needed():
    """Scaling: at the tail, idle groups, encoders and decoders are released, which is no failure."""
    world = World(limits(encoders=2, groups=3, decoders=2), plan_of(7))
    advance(world, lambda world: len(world.committed) == 6)
    alive = [*world.starting, *world.idle, *world.running]
    assert len(alive) == 1, "the decoder of the last sample"
    assert {worker.stage for worker in world.released} == {Stage.ENCODE, Stage.DENOISE, Stage.DECODE}
    world.run_to_end()
    assert world.finish == Finish(drained=False)
    assert not world.killed


def test_a_group_that_is_not_placed_is_withdrawn():
    """Scaling: a pending request is withdrawn once the placed groups are enough."""
    world = World(limits(encoders=1, groups=2, decoders=1, batch=1), plan_of(2), has_room=False)
    for _ in range(3):
        for worker in list(world.starting):
            if worker.slot == 0:
                world.feed(WorkerPlaced(worker))
                world.ready(worker)
    waiting = [worker for worker in world.starting if worker.slot == 1]
    assert [worker.stage for worker in waiting] == [Stage.DENOISE], "requested while there is work for two groups"
    advance_first_slots(world, until=lambda: waiting[0] in world.released)
    assert len(world.committed) < 2


def advance_first_slots(world, until):
    for _ in range(100):
        if until():
            return
        world.done(next(iter(world.running)))
    pytest.fail("the condition was never reached")


def test_a_released_encoder_comes_back_for_a_retry():
    """P5: an encoder released at the tail is started again if a retry needs it."""
    world = World(limits(groups=1), plan_of(1))
    advance(world, only_denoising)
    assert {worker.stage for worker in world.released} == {Stage.ENCODE}
    world.lost(group_of(world), FailureClass.INFRA)
    assert Stage.ENCODE in {worker.stage for worker in world.starting}
    world.run_to_end()
    assert world.committed == ["s0"]


def test_groups_make_room_for_a_stage_without_workers():
    """P5, P33: if no decoder is placed, idle groups are released one by one, except the last one."""
    world = World(limits(groups=3), plan_of(40))
    advance(world, lambda world: world.committed)
    world.has_room = False
    decoder = next(w for w in (*world.running, *world.idle) if w.stage is Stage.DECODE)
    world.lost(decoder, FailureClass.INFRA)
    for _ in range(100):  # the groups work until the decode queue is full
        busy = [w for w in world.running if w.stage is not Stage.DECODE]
        if busy:
            world.feed(WorkerPlaced(busy[0]))
            world.done(busy[0])
    groups = [w for w in world.idle if w.stage is Stage.DENOISE]
    assert len(groups) == 3
    world.tick(STARVED_AFTER_S)
    assert len([w for w in world.released if w.stage is Stage.DENOISE]) == 1
    for _ in range(5):
        world.tick(MAKE_ROOM_EVERY_S)
    assert len([w for w in world.released if w.stage is Stage.DENOISE]) == 2
    assert not any(w.stage is Stage.DENOISE for w in world.starting), "released groups are not requested again"
    world.has_room = True
    world.feed(WorkerPlaced(next(w for w in world.starting if w.stage is Stage.DECODE)))
    assert any(w.stage is Stage.DENOISE for w in world.starting), "groups are requested again"
    world.run_to_end()
    assert len(world.committed) == 40


def test_idle_workers_make_room_for_the_first_group():
    """P33: if the last group is lost and not placed again, idle encoders and decoders are released, and start again
    when the group is placed.
    """
    world = World(limits(groups=1), plan_of(40))
    advance(world, lambda world: world.committed)
    world.has_room = False
    world.lost(next(w for w in (*world.idle, *world.running) if w.stage is Stage.DENOISE), FailureClass.INFRA)
    while busy := next(iter(world.running), None):
        world.done(busy)
    assert {worker.stage for worker in world.idle} == {Stage.ENCODE, Stage.DECODE}
    world.tick(STARVED_AFTER_S)
    assert not world.idle
    assert [worker.stage for worker in world.starting] == [Stage.DENOISE], "no other worker is requested"
    world.has_room = True
    world.feed(WorkerPlaced(world.starting[0]))
    assert {worker.stage for worker in world.starting} == set(Stage)
    world.run_to_end()
    assert len(world.committed) == 40


def test_groups_without_budget_make_room_for_decoders():
    """P5, P7, P33: groups that are idle because their object-store budget is used up make room for decoders."""
    many = {Stage.DECODE: StageLimits(workers=2, ahead=100, task_timeout_s=math.inf)}
    plan = [Admitted(f"s{i}", Stage.ENCODE, 5) for i in range(40)]
    world = World(limits(groups=3, result_bytes=20) | many, plan)
    advance(world, lambda world: world.committed)
    world.has_room = False
    decoders = [w for w in (*world.starting, *world.running, *world.idle) if w.stage is Stage.DECODE]
    world.lost(decoders[1], FailureClass.INFRA)
    for _ in range(100):  # the other decoder is busy and too slow
        if busy := [w for w in world.running if w.stage is not Stage.DECODE]:
            world.done(busy[0])
    assert len([w for w in world.idle if w.stage is Stage.DENOISE]) == 3
    world.tick(STARVED_AFTER_S)
    assert len([w for w in world.released if w.stage is Stage.DENOISE]) == 1


def test_events_of_a_released_worker_are_stale():
    """A late event of a released worker changes nothing."""
    world = World(limits(groups=1), plan_of(1))
    advance(world, only_denoising)
    for released in world.released:
        world.feed(TaskDone(released))
        world.feed(WorkerLeaving(released, 1.0))
    world.run_to_end()
    assert world.committed == ["s0"]
