"""hv_batch.job.scheduling.scheduler in runs without decoders, where groups decode what groups have denoised."""

from __future__ import annotations

import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.failure import FailureClass
from hv_batch.job.scheduling.limits import OUTAGE_PAUSE_S
from hv_batch.job.scheduling.messages import WorkerPlaced
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import RETRIES, World, advance, limits, pass_time, plan_of


def decoding(world):
    return [worker for worker, keys in world.running.items() if world.at[keys[0]] is Stage.DECODE]


def test_a_group_decodes_before_it_denoises_again():
    """The stage closest to the commit has priority, and each stage processes each sample once."""
    world = World(limits(groups=1, decoders=0), plan_of(4))
    advance(world, decoding)
    assert world.at["s0"] is Stage.DECODE
    assert [key for stage, key in world.runs if stage is Stage.DENOISE] == ["s0"]
    world.run_to_end()
    assert world.committed == ["s0", "s1", "s2", "s3"]
    assert set(world.runs.values()) == {1}
    assert Stage.DECODE not in {worker.stage for worker in (*world.idle, *world.released)}


@pytest.mark.parametrize("how", ["failed", "lost"])
@pytest.mark.parametrize("kind", [FailureClass.INFRA, FailureClass.GPU_OOM])
def test_a_failed_decode_repeats_no_denoise(how, kind):
    """P4: whether or not the group survives, the sample is decoded again and neither encoded nor denoised again."""
    world = World(limits(groups=2, decoders=0), plan_of(3))
    advance(world, decoding)
    (group,) = decoding(world)
    (key,) = world.running[group]
    getattr(world, how)(group, kind)
    world.run_to_end()
    assert sorted(world.committed) == ["s0", "s1", "s2"]
    assert (world.runs[Stage.DENOISE, key], world.runs[Stage.DECODE, key]) == (1, 2)


def test_a_poisoned_decode_is_quarantined_after_its_budget():
    """P5: frames that are not finite quarantine their sample and do not affect the group."""
    world = World(limits(groups=1, decoders=0), plan_of(2))
    while not world.finish:
        bad = [worker for worker in decoding(world) if world.running[worker] == ("s0",)]
        if bad:
            world.failed(bad[0], FailureClass.POISON)
        else:
            advance(world, lambda world: world.finish or decoding(world) or world.committed)
            if decoding(world) and world.running[decoding(world)[0]] != ("s0",):
                world.done(decoding(world)[0])
    assert world.quarantined == ["s0"]
    assert world.committed == ["s1"]
    assert not world.killed
    assert world.runs[Stage.DECODE, "s0"] == RETRIES.poison


def test_groups_continue_to_denoise_in_an_outage():
    """P5: in an outage no decode starts, and groups denoise until the decode queue is full."""
    world = World(limits(groups=2, decoders=0), plan_of(20))
    advance(world, decoding)
    world.failed(decoding(world)[0], FailureClass.OUTAGE)
    for _ in range(30):
        world.process_events()
        busy = [worker for worker in world.running if worker not in decoding(world)]
        if busy:
            world.done(busy[0])
    assert not decoding(world)
    waiting = sum(place is Stage.DECODE for place in world.at.values())
    assert waiting == world.stages[Stage.DECODE].ahead
    assert not world.killed
    pass_time(world, OUTAGE_PAUSE_S)
    assert decoding(world)
    world.run_to_end()
    assert len(world.committed) == 20


def test_stored_latents_need_only_a_group():
    """P4: a resume with only decodes left starts no encoder, and as many groups as there are decodes."""
    world = World(limits(groups=3, decoders=0), plan_of(2, Stage.DECODE))
    assert [worker.stage for worker in world.starting] == [Stage.DENOISE] * 2
    world.run_to_end()
    assert len(world.committed) == 2


def test_the_last_group_stays_for_the_last_decode():
    """Scaling: at the tail, as many groups are kept as there are videos to decode."""
    world = World(limits(groups=3, decoders=0), plan_of(7))
    advance(world, lambda world: len(world.committed) == 6)
    assert [worker.stage for worker in (*world.starting, *world.idle, *world.running)] == [Stage.DENOISE]
    assert not world.killed


def test_idle_groups_are_not_released_for_missing_decoders():
    """P33: without decoders, a full decode queue releases no group, because the groups empty it."""
    world = World(limits(groups=2, decoders=0), plan_of(30), has_room=False)
    for worker in list(world.starting):
        world.feed(WorkerPlaced(worker))
    world.has_room = True
    advance(world, lambda world: len(world.committed) > 3)
    pass_time(world, 2000.0)
    assert not [worker for worker in world.released if worker.stage is Stage.DENOISE]


def test_group_placement_leaves_the_decode_stage_without_workers():
    """decoders.placement: group overrides decoders.count."""
    config = RunConfig.model_validate({"decoders": {"placement": "group", "count": 5}, "groups": {"count": 3}})
    limits_of = resolve_run(config).stage_limits({})[Stage.DECODE]
    assert limits_of.workers == 0
    assert limits_of.ahead == 6, "a group may have one finished denoise in the queue"
