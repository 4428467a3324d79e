"""hv_batch.job.scheduling.scheduler: what happens when a stop is requested."""

from __future__ import annotations

from hv_batch.job.scheduling.messages import (
    Finish,
    StopRequested,
)
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import World, denoising, limits, plan_of, until_denoising


def test_drain_finishes_running_samples_and_starts_none():
    """Exit code 143: after a stop, running denoises are decoded and committed, and no other sample starts."""
    world = World(limits(groups=1), plan_of(8))
    while not any(worker.stage is Stage.DENOISE for worker in world.running):
        world.ready(world.starting[0]) if world.starting else world.done(next(iter(world.running)))
    (sample,) = next(task for worker, task in world.running.items() if worker.stage is Stage.DENOISE)
    world.feed(StopRequested())
    world.run_to_end()
    assert world.finish == Finish(drained=True)
    assert world.committed == [sample]


def test_a_stop_asks_every_running_denoise_for_a_checkpoint():
    """P4: each running denoise gets one request at once, because it may outlast the drain; other workers get none."""
    world = World(limits(groups=2), plan_of(8))
    while sum(worker.stage is Stage.DENOISE for worker in world.running) < 2:
        early = [worker for worker in world.running if worker.stage is Stage.ENCODE]
        world.ready(world.starting[0]) if world.starting else world.done(early[0])
    groups = {worker for worker in world.running if worker.stage is Stage.DENOISE}
    assert not world.checkpoints
    world.feed(StopRequested())
    world.feed(StopRequested())
    assert sorted(world.checkpoints) == sorted(groups)


def test_a_long_drain_requests_checkpoints_again_near_its_end():
    """P4: the steps since the stop are not lost either, if a denoise does not end in time."""
    world = World(limits(groups=1), plan_of(8), drain_timeout_s=600.0)
    until_denoising(world, groups=1)
    (group,) = denoising(world)
    world.feed(StopRequested())
    world.pass_time_until(569.0, lambda: False)
    assert world.checkpoints == [group]
    world.pass_time_until(30.0, lambda: False)
    assert world.checkpoints == [group, group]
    assert not world.finish


def test_drain_ends_at_its_deadline():
    """P4: a drain waits at most drain_timeout_s for a running task."""
    world = World(limits(groups=1), plan_of(8), drain_timeout_s=20.0)
    while not any(worker.stage is Stage.DENOISE for worker in world.running):
        world.ready(world.starting[0]) if world.starting else world.done(next(iter(world.running)))
    world.feed(StopRequested())
    world.tick(19.0)
    assert not world.finish
    world.tick(2.0)
    assert world.finish == Finish(drained=True)
