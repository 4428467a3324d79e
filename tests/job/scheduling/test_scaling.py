"""Workers that leave with their nodes, and how many there are: what the scheduler promises of both."""

from __future__ import annotations

import math

import pytest

from hv_batch.job.failure import FailureClass
from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import Admitted, Finish, TaskDone, WorkerLeaving, WorkerPlaced
from hv_batch.job.scheduling.scaling import MAKE_ROOM_EVERY_S, STARVED_AFTER_S
from hv_batch.job.scheduling.worker_slots import END_MARGIN_S, LAST_CHECKPOINT_S
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
    """P5: its slot starts again elsewhere, and the loss counts neither for the slot nor for a sample."""
    world = World(limits(groups=1), plan_of(2))
    group = next(worker for worker in world.starting if worker.stage is Stage.DENOISE)
    if what == "idle":
        world.ready(group)
    world.leave(group, 120.0)
    assert world.killed[group].kind is FailureClass.PREEMPTED
    assert [w for w in world.starting if w.stage is Stage.DENOISE] == [type(group)(Stage.DENOISE, 0, 1)]


def test_a_task_may_finish_before_the_node_goes():
    """P4: nothing is lost and nobody charged; the group, which gets no further sample, ends after it."""
    world = World(limits(groups=1), plan_of(2))
    advance(world, only_denoising)
    group = group_of(world)
    world.leave(group, 120.0)
    assert world.checkpoints == [group]
    pass_time(world, 60.0)
    world.done(group)
    assert world.killed[group].kind is FailureClass.PREEMPTED
    world.calm_down()
    assert world.runs[Stage.DENOISE, "s0"] == 1
    assert sorted(world.committed) == ["s0", "s1"]


def test_a_task_that_cannot_finish_is_given_up_in_time():
    """P4, P5: a checkpoint at the notice and one near the end, then the sample goes first in line, once PREEMPTED."""
    world = World(limits(groups=1), plan_of(3))
    advance(world, only_denoising)
    group = group_of(world)
    (key,) = world.running[group]
    world.leave(group, 120.0)
    pass_time(world, 30.0)
    assert world.checkpoints == [group]
    world.feed(WorkerLeaving(group, 120.0))  # said again at every look
    pass_time(world, 90.0 - LAST_CHECKPOINT_S)
    assert world.checkpoints == [group, group]
    pass_time(world, LAST_CHECKPOINT_S - END_MARGIN_S - 1.0)
    assert group in world.running
    world.tick(1.0)
    assert world.killed[group].kind is FailureClass.PREEMPTED
    assert [failure.kind for failure in world.scheduler.failures(key)] == [FailureClass.PREEMPTED]
    assert world.checkpoints == [group, group]
    world.calm_down()
    assert len(world.committed) == 3


def test_a_node_that_goes_early_blames_nobody():
    """P5: a group that dies on a node that was to go anyway was PREEMPTED, whatever the ranks say of it."""
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
    world.calm_down()
    assert world.committed == ["s0"]


def test_the_tail_releases_who_is_not_needed():
    """Elastic: towards the end idle groups, encoders and decoders go, and nothing of it is a failure."""
    world = World(limits(encoders=2, groups=3, decoders=2), plan_of(7))
    advance(world, lambda world: len(world.committed) == 6)
    alive = [*world.starting, *world.idle, *world.running]
    assert len(alive) == 1, "the decoder of the last sample"
    assert {worker.stage for worker in world.released} == {Stage.ENCODE, Stage.DENOISE, Stage.DECODE}
    world.calm_down()
    assert world.finish == Finish(drained=False)
    assert not world.killed


def test_a_group_that_finds_no_room_is_withdrawn():
    """Elastic: a placement that waits for a node is given back once the placed groups suffice."""
    world = World(limits(encoders=1, groups=2, decoders=1, batch=1), plan_of(2), has_room=False)
    for _ in range(3):
        for worker in list(world.starting):
            if worker.slot == 0:
                world.feed(WorkerPlaced(worker))
                world.ready(worker)
    waiting = [worker for worker in world.starting if worker.slot == 1]
    assert [worker.stage for worker in waiting] == [Stage.DENOISE], "asked for while there is work for two"
    advance_first_slots(world, until=lambda: waiting[0] in world.released)
    assert len(world.committed) < 2


def advance_first_slots(world, until):
    for _ in range(100):
        if until():
            return
        world.done(next(iter(world.running)))
    pytest.fail("never came to it")


def test_a_released_encoder_comes_back_for_a_retry():
    """P5: what is let go at the tail is started again when a failure needs it."""
    world = World(limits(groups=1), plan_of(1))
    advance(world, only_denoising)
    assert {worker.stage for worker in world.released} == {Stage.ENCODE}
    world.lost(group_of(world), FailureClass.INFRA)
    assert Stage.ENCODE in {worker.stage for worker in world.starting}
    world.calm_down()
    assert world.committed == ["s0"]


def test_a_station_without_workers_is_given_room():
    """P5, P33: where no decoder finds room, idle groups make some, one after the other, and the last one stays."""
    world = World(limits(groups=3), plan_of(40))
    advance(world, lambda world: world.committed)
    world.has_room = False
    decoder = next(w for w in (*world.running, *world.idle) if w.stage is Stage.DECODE)
    world.lost(decoder, FailureClass.INFRA)
    for _ in range(100):  # the groups work until nobody takes what they make
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
    assert not any(w.stage is Stage.DENOISE for w in world.starting), "who gave room does not ask for it again"
    world.has_room = True
    world.feed(WorkerPlaced(next(w for w in world.starting if w.stage is Stage.DECODE)))
    assert any(w.stage is Stage.DENOISE for w in world.starting), "there is room again"
    world.calm_down()
    assert len(world.committed) == 40


def test_nobody_stands_in_the_way_of_the_first_group():
    """P33: where the last group has gone and finds no room, idle single actors leave the nodes it might stand on, and
    come back when it has its place.
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
    assert [worker.stage for worker in world.starting] == [Stage.DENOISE], "nobody else is asked for"
    world.has_room = True
    world.feed(WorkerPlaced(world.starting[0]))
    assert {worker.stage for worker in world.starting} == set(Stage)
    world.calm_down()
    assert len(world.committed) == 40


def test_a_decoder_that_bytes_wait_for_is_given_room():
    """P5, P7, P33: groups that stand idle because the store holds no more latents make room for decoders."""
    many = {Stage.DECODE: StageLimits(workers=2, ahead=100, task_timeout_s=math.inf)}
    plan = [Admitted(f"s{i}", Stage.ENCODE, 5) for i in range(40)]
    world = World(limits(groups=3, result_bytes=20) | many, plan)
    advance(world, lambda world: world.committed)
    world.has_room = False
    decoders = [w for w in (*world.starting, *world.running, *world.idle) if w.stage is Stage.DECODE]
    world.lost(decoders[1], FailureClass.INFRA)
    for _ in range(100):  # the other decoder is at work, too slowly
        if busy := [w for w in world.running if w.stage is not Stage.DECODE]:
            world.done(busy[0])
    assert len([w for w in world.idle if w.stage is Stage.DENOISE]) == 3
    world.tick(STARVED_AFTER_S)
    assert len([w for w in world.released if w.stage is Stage.DENOISE]) == 1


def test_the_news_of_a_released_worker_is_stale():
    """A late answer of a worker that was let go changes nothing."""
    world = World(limits(groups=1), plan_of(1))
    advance(world, only_denoising)
    for released in world.released:
        world.feed(TaskDone(released))
        world.feed(WorkerLeaving(released, 1.0))
    world.calm_down()
    assert world.committed == ["s0"]
