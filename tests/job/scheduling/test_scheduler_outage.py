"""hv_batch.job.scheduling.outage: an output root that does not answer costs no sample an attempt."""

from __future__ import annotations

import pytest

from hv_batch.job.failure import FailureClass
from hv_batch.job.scheduling import backpressure
from hv_batch.job.scheduling.limits import OUTAGE_LIMIT_S, OUTAGE_PAUSE_S
from hv_batch.job.scheduling.messages import (
    Admitted,
    Finish,
    StopRequested,
)
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import MIB, RETRIES, World, drive, limits, plan_of, until_denoising


def test_an_outage_of_the_output_root_charges_no_sample():
    """P5: while the store is unreachable, decodes wait and are tried again; no sample is charged."""
    world = World(limits(groups=1), plan_of(4))
    drive(
        world, lambda w, k: ("failed", FailureClass.OUTAGE) if w.stage is Stage.DECODE and world.now < 600.0 else None
    )
    assert world.finish
    assert len(world.committed) == 4
    assert world.runs[Stage.DENOISE, "s0"] == 1


def test_spooled_videos_do_not_stop_the_groups():
    """P5, P7: in an outage, a spooled video takes no queue place and no object-store bytes; all videos are committed
    later and rendered once.
    """
    plan = [Admitted(f"s{i}", Stage.ENCODE, MIB) for i in range(30)]
    world = World(limits(groups=2, result_bytes=MIB), plan)
    while world.running or world.starting:
        decodes = [worker for worker in world.running if worker.stage is Stage.DECODE]
        if world.starting:
            world.ready(world.starting[0])
        else:
            world.spool(decodes[0]) if decodes else world.done(next(iter(world.running)))
    assert len(world.spooled) == 30
    assert not world.finish
    for key in list(world.spooled):
        world.publish(key)
    assert world.finish == Finish(drained=False)
    assert set(world.runs.values()) == {1}


def test_a_worker_that_cannot_start_in_an_outage_delays_no_decode():
    """P5: its start is retried without limit, and the other workers decode to their spools."""
    world = World(limits(groups=1, decoders=2), plan_of(30))
    late = [worker for worker in world.starting if worker.stage is Stage.DECODE][-1]
    for _ in range(RETRIES.worker + 1):
        world.lost(late, FailureClass.OUTAGE)
        for worker in [worker for worker in world.starting if worker.stage is not Stage.DECODE or not worker.slot]:
            world.ready(worker)
        while not (decodes := [worker for worker in world.running if worker.stage is Stage.DECODE]):
            world.done(next(iter(world.running)))
        world.spool(decodes[0])
        world.tick(OUTAGE_PAUSE_S)
        (late,) = [worker for worker in world.starting if worker.stage is Stage.DECODE]
    assert not world.abort
    world.run_to_end()
    assert len(world.committed) == 30


def test_two_short_outages_are_not_one_long_outage():
    """P5: a started worker has reached the output root, so a long denoise between two outages does not count."""
    world = World(limits(groups=1), plan_of(1))
    decoder = next(worker for worker in world.starting if worker.stage is Stage.DECODE)
    world.lost(decoder, FailureClass.OUTAGE)
    world.tick(OUTAGE_PAUSE_S)
    while not any(worker.stage is Stage.DENOISE for worker in world.running):
        world.ready(world.starting[0]) if world.starting else world.done(next(iter(world.running)))
    for worker in list(world.starting):
        world.ready(worker)
    world.pass_time_until(OUTAGE_LIMIT_S + 1, lambda: False)
    world.done(next(iter(world.running)))
    world.failed(next(iter(world.running)), FailureClass.OUTAGE)
    assert not world.abort
    world.run_to_end()
    assert world.committed == ["s0"]


@pytest.mark.parametrize(("stage", "denoises"), [(Stage.DECODE, 1), (Stage.ENCODE, 1 + 2 * RETRIES.infra)])
def test_a_lost_spool_charges_no_sample(stage, denoises):
    """P4, P5: the sample continues from its stored latents, or else from the start, any number of times."""
    world = World(limits(groups=1), plan_of(1))
    for _ in range(2 * RETRIES.infra):
        while not (decodes := [worker for worker in world.running if worker.stage is Stage.DECODE]):
            world.ready(world.starting[0]) if world.starting else world.done(next(iter(world.running)))
        world.spool(decodes[0])
        world.lose_spooled("s0", stage)
        assert world.scheduler.failures("s0") == ()
    world.run_to_end()
    assert world.committed == ["s0"]
    assert world.runs[Stage.DENOISE, "s0"] == denoises


def test_the_number_of_spooled_videos_is_bounded(monkeypatch):
    """P7: beyond MAX_SPOOLED, decodes wait, as they do if the disks are full."""
    monkeypatch.setattr(backpressure, "MAX_SPOOLED", 5)
    world = World(limits(groups=2, decoders=2), plan_of(30))
    for _ in range(200):
        decodes = [worker for worker in world.running if worker.stage is Stage.DECODE]
        if world.starting:
            world.ready(world.starting[0])
        elif decodes:
            world.spool(decodes[0])
        elif world.running:
            world.done(next(iter(world.running)))
    assert len(world.spooled) == 5
    assert not world.running
    world.run_to_end()
    assert len(world.committed) == 30


def test_a_drain_in_an_outage_spools_and_ends_in_time():
    """P4: a drain during an outage leaves denoised samples in the spools; the resume commits them."""
    world = World(limits(groups=1), plan_of(8), drain_timeout_s=60.0)
    until_denoising(world, groups=1)
    world.feed(StopRequested())
    while world.running:
        decodes = [worker for worker in world.running if worker.stage is Stage.DECODE]
        world.spool(decodes[0]) if decodes else world.done(next(iter(world.running)))
        for worker in list(world.starting):
            world.ready(worker)
    assert len(world.spooled) == 1
    assert not world.finish
    world.tick(61.0)
    assert world.finish == Finish(drained=True)


def test_an_outage_that_does_not_end_ends_the_run():
    """Design section 6: after half an hour without its output root a run ends with an error."""
    world = World(limits(groups=1), plan_of(4))
    drive(world, lambda w, k: ("failed", FailureClass.OUTAGE) if w.stage is Stage.DECODE else None)
    assert world.abort.failure.kind is FailureClass.FATAL
    assert 1800 < world.now < 2400
