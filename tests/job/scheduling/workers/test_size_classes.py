"""job.scheduling.workers.size_classes: when groups of one size are released for another, in whole schedules."""

from __future__ import annotations

import pytest

from hv_batch.job.failure import FailureClass
from hv_batch.job.scheduling.messages import Admitted
from hv_batch.job.scheduling.workers.size_classes import LOAD_S, MAX_WAIT_S
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import World, limits, pass_time

LARGE, SMALL = 0, 1  # size classes
DENOISE_S = 200.0


def samples(*size_classes):
    return [Admitted(f"s{i}", size_class=size_class) for i, size_class in enumerate(size_classes)]


def denoising(world):
    return {world.sizes[worker]: worker for worker in world.running if worker.stage is Stage.DENOISE}


def others_work(world):
    """Let all starts, encodings and decodes succeed."""
    for _ in range(1000):
        busy = [worker for worker in world.running if worker.stage is not Stage.DENOISE]
        if world.starting:
            world.ready(world.starting[0])
        elif busy:
            world.done(busy[0])
        else:
            return
    pytest.fail("the other stages never stopped")


def render_for(world, seconds):
    """Let `seconds` pass in which each denoise takes DENOISE_S."""
    until = world.now + seconds
    while world.now < until and not world.finish:
        others_work(world)
        pass_time(world, DENOISE_S)
        for worker in list(world.running):
            world.done(worker) if worker.stage is Stage.DENOISE else None
        others_work(world)


def test_a_size_without_a_group_gets_one_after_a_bounded_wait():
    """No starvation: while another size has an endless supply, a size waits at most MAX_WAIT_S and one sample."""
    world = World(limits(groups=1, ranks=(8, 1)), samples(LARGE, SMALL, *[LARGE] * 40))
    render_for(world, MAX_WAIT_S - 2 * DENOISE_S)
    assert "s1" in world.at, "a group with samples was released too early"
    assert not world.released
    render_for(world, 4 * DENOISE_S)
    assert "s1" in world.committed
    world.run_to_end()
    assert len(world.committed) == 42


def test_small_groups_are_released_for_a_large_one():
    """No starvation: eight groups of one rank are released, each after its sample, and not requested again."""
    world = World(limits(groups=1, batch=16, ranks=(8, 1)), samples(*[SMALL] * 8, LARGE, *[SMALL] * 200))
    others_work(world)
    assert len(world.groups()) == 8
    render_for(world, MAX_WAIT_S + 3 * DENOISE_S)
    assert "s8" in world.committed
    world.run_to_end()
    assert len(world.committed) == 209


def test_an_idle_group_is_kept_as_long_as_a_load_takes():
    """No thrashing: a group without samples is released for another size only after LOAD_S."""
    world = World(limits(groups=1, ranks=(8, 1)), samples(LARGE, *[SMALL] * 40, *[LARGE] * 40))
    render_for(world, DENOISE_S)
    assert "s0" in world.committed
    assert "s1" in world.at
    world.tick(LOAD_S - 1.0)
    assert not world.released
    world.tick(1.0)
    (released,) = world.released
    assert world.sizes[released] == LARGE
    others_work(world)
    assert set(denoising(world)) == {SMALL}
    assert len(world.groups()) == 8, "eight groups of one rank replace the group of eight"
    world.run_to_end()
    assert len(world.committed) == 81


def test_groups_of_a_single_size_are_never_exchanged():
    """If all groups have one size, none is released before the tail."""
    world = World(limits(groups=2, ranks=(8,)), samples(*[LARGE] * 60))
    render_for(world, MAX_WAIT_S + 2 * DENOISE_S)
    assert world.queue
    assert not world.released
    world.run_to_end()
    assert len(world.committed) == 60


def test_a_size_whose_groups_never_start_ends_the_run():
    """P6: samples of an abandoned size can never be rendered, so the run ends; the reason names the size."""
    world = World(limits(groups=1, ranks=(2, 1)), samples(LARGE, SMALL, SMALL, SMALL))
    for _ in range(4000):
        if world.abort or world.finish:
            break
        small = [w for w in world.starting if w.stage is Stage.DENOISE and world.sizes[w] == SMALL]
        if small:
            world.lost(small[0], FailureClass.INFRA)
        elif world.starting:
            world.ready(world.starting[0])
        elif world.running:
            world.done(next(iter(world.running)))
        else:
            world.tick(30.0)
    assert world.abort
    assert "every group of 1 was lost 4 times in a row" in world.abort.failure.message
    assert "s0" in world.committed
