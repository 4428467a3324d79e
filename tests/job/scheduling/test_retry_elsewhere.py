"""P5: a decode that failed because of its node is tried again by another worker."""

from __future__ import annotations

import pytest

from hv_batch.job.failure import FailureClass
from hv_batch.job.scheduling.messages import TaskFailed, WorkerLost
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import World, limits, plan_of


def two_decoders(samples: int) -> World:
    world = World(limits(decoders=2), plan_of(samples, Stage.DECODE))
    while world.starting:
        world.ready(world.starting[0])
    assert len(world.running) == 2
    return world


@pytest.mark.parametrize("event", [TaskFailed, WorkerLost])
def test_the_second_attempt_goes_to_another_decoder(event):
    """The worker that failed takes another sample, or waits if there is none; the other one repeats the decode."""
    world = two_decoders(samples=2)
    (broken, (key,)), (healthy, _) = world.running.items()
    (world.failed if event is TaskFailed else world.lost)(broken, FailureClass.INFRA)
    while world.starting:
        world.ready(world.starting[0])
    assert list(world.running) == [healthy], "a decode that failed waits for the other worker"
    world.done(healthy)
    assert world.running == {healthy: (key,)}
    world.run_to_end()
    assert not world.quarantined


def test_one_broken_decoder_among_two_quarantines_nothing():
    """Every decode of the broken worker fails, and no sample fails there twice."""
    world = two_decoders(samples=12)
    broken = sorted(world.running)[0].slot
    while not (world.finish or world.abort):
        if world.starting:
            world.ready(world.starting[0])
        elif bad := [worker for worker in world.running if worker.slot == broken]:
            world.failed(bad[0], FailureClass.INFRA)
        elif world.running:
            world.done(next(iter(world.running)))
        else:
            world.tick(30.0)
    assert len(world.committed) == 12
    assert not world.quarantined
    assert max(world.runs.values()) == 2


def test_the_only_decoder_repeats_its_own_decode():
    """A run with one decoder does not wait for another."""
    world = World(limits(decoders=1), plan_of(1, Stage.DECODE))
    world.ready(world.starting[0])
    world.failed(next(iter(world.running)), FailureClass.INFRA)
    assert list(world.running.values()) == [("s0",)]


def test_a_sample_does_not_wait_for_a_decoder_that_is_lost():
    """If the other worker ends, the one that failed takes the sample."""
    world = two_decoders(samples=2)
    broken, healthy = world.running
    world.failed(broken, FailureClass.INFRA)
    assert broken not in world.running
    world.lost(healthy, FailureClass.PREEMPTED)
    assert broken in world.running
