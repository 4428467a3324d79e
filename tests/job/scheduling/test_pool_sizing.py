"""hv_batch.job.scheduling.pool_sizing: the size of `auto` pools and when it changes."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.failure import FailureClass
from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import Heartbeat
from hv_batch.job.scheduling.pool_sizing import HEADROOM, RECENT, SHRINK_AFTER_S, SPARE, PoolSizer
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import RETRIES, STALL_S, World, limits, plan_of


def auto_pools(groups=8, most=16):
    """A PoolSizer with an `auto` pool of decoders."""
    return PoolSizer(limits(groups=groups) | {Stage.DECODE: auto(most)})


def auto(most):
    return StageLimits(workers=most, auto=True, ahead=10 * most, task_timeout_s=STALL_S)


def measure(pools, stage, *seconds):
    for taken in seconds:
        pools.measure(stage, taken, first=False)


def resize(pools, groups, now):
    """Resize for `groups` groups and return the number of decoders."""
    for change in pools.resize(groups, now, may_shrink=True):
        assert change.stage is Stage.DECODE
        assert change.workers == pools.most(Stage.DECODE)
        assert f"{change.workers} decoder(s) instead of" in change.reason
    return pools.most(Stage.DECODE)


@settings(max_examples=100, deadline=None)
@given(
    groups=st.integers(1, 20),
    denoise_s=st.floats(10.0, 2000.0),
    share=st.floats(0.01, 1.5),
    noise=st.floats(0.0, 0.25),
    seed=st.integers(0, 1000),
)
def test_a_pool_converges_and_stays(groups, denoise_s, share, noise, seed):
    """Property: for any times and noise, the pool size settles between the need and SPARE times the need, within one
    worker, and then does not oscillate.
    """
    pools, drawn, now = auto_pools(groups, most=2 * groups), random.Random(seed), 0.0
    need = max(1, groups * share * HEADROOM)
    sizes, settled_from = [], None
    while now < 4 * SHRINK_AFTER_S or len(sizes) < 5 * RECENT:
        if settled_from is None and now > 2.5 * SHRINK_AFTER_S and len(sizes) > 2 * RECENT:
            settled_from = len(sizes)
        now += denoise_s / groups
        measure(pools, Stage.DENOISE, denoise_s * drawn.uniform(1 - noise, 1 + noise))
        measure(pools, Stage.DECODE, share * denoise_s * drawn.uniform(1 - noise, 1 + noise))
        sizes.append(resize(pools, groups, now))
    settled = sizes[settled_from:]
    sway = 1 + 0.4 * noise  # four standard deviations of the quotient of two means of 64 times
    assert all(need / sway - 1 <= size <= need * SPARE * sway + 1 for size in settled)
    turns = [before < after for before, after in pairwise(settled) if before != after]
    assert len(set(turns)) <= 1, f"grew (True) and shrank alternately: {turns}"


def test_a_warm_up_does_not_change_the_size():
    """A pool has one worker until task times are known; a first task, which includes warm-up, does not count."""
    pools = auto_pools()
    assert resize(pools, 8, 0.0) == 1
    pools.measure(Stage.DENOISE, 100.0, first=True)
    pools.measure(Stage.DECODE, 500.0, first=True)
    assert resize(pools, 8, 1.0) == 1
    measure(pools, Stage.DECODE, 50.0)
    assert resize(pools, 8, 2.0) == 5, "first denoises count until later ones have ended, which takes minutes"
    measure(pools, Stage.DENOISE, 200.0)
    assert resize(pools, 8, 2.0) == 5
    assert resize(pools, 8, 2.0 + SHRINK_AFTER_S) == 3


def test_one_outlier_changes_nothing():
    """One decode that waited ten minutes for an unreachable store does not grow the pool."""
    pools = auto_pools()
    measure(pools, Stage.DENOISE, *[100.0] * 5)
    measure(pools, Stage.DECODE, *[20.0] * 5)
    assert resize(pools, 8, 0.0) == 2
    measure(pools, Stage.DECODE, 600.0)
    assert resize(pools, 8, 1.0) == 2


def test_mixed_shapes_are_averaged_over_samples():
    """Eight groups with images (1 s) and videos (99 s) in turn give a sample every 6.25 s: 1.6 decoders of 10 s."""
    pools = auto_pools()
    measure(pools, Stage.DENOISE, *[1.0, 99.0] * (RECENT // 2))
    measure(pools, Stage.DECODE, *[1.0, 19.0] * (RECENT // 2))
    assert resize(pools, 8, 0.0) == 2


def test_a_pool_grows_at_once_and_shrinks_after_minutes():
    """Hysteresis: more groups grow the pool at once; fewer groups shrink it only later, to the largest recent need."""
    pools = auto_pools()
    measure(pools, Stage.DENOISE, *[100.0] * 3)
    measure(pools, Stage.DECODE, *[50.0] * 3)
    assert resize(pools, 4, 0.0) == 3
    assert resize(pools, 8, 1.0) == 5
    assert resize(pools, 1, 2.0) == 5
    assert resize(pools, 4, 100.0) == 5
    assert resize(pools, 1, 1.0 + SHRINK_AFTER_S) == 5
    assert resize(pools, 1, 2.0 + SHRINK_AFTER_S) == 3, "the need of four groups in between"
    assert resize(pools, 8, 3.0 + SHRINK_AFTER_S) == 5


def test_a_pool_has_a_maximum():
    """A decode that takes far longer than a denoise grows the pool only to its limit; fixed pools do not change."""
    pools = auto_pools(groups=3, most=6)
    measure(pools, Stage.DENOISE, *[1.0] * 3)
    measure(pools, Stage.DECODE, *[60.0] * 3)
    measure(pools, Stage.ENCODE, *[60.0] * 3)
    assert resize(pools, 3, 0.0) == 6
    assert pools.most(Stage.ENCODE) == 1
    assert list(pools.resize(3, 1.0, may_shrink=True)) == []


def test_the_config_determines_which_pools_are_auto():
    """`count: auto` allows one encoder and two decoders for each group; the default is one of each."""
    config = RunConfig.model_validate({"groups": {"count": 3}, "decoders": {"count": "auto"}})
    assert resolve_run(config).max_workers == {Stage.ENCODE: 1, Stage.DENOISE: 3, Stage.DECODE: 6}
    assert [stage for stage, of_stage in resolve_run(config).stage_limits({}).items() if of_stage.auto] == [
        Stage.DECODE
    ]
    config = RunConfig.model_validate({"groups": {"count": 3}, "encoders": {"count": "auto"}})
    assert resolve_run(config).max_workers == {Stage.ENCODE: 3, Stage.DENOISE: 3, Stage.DECODE: 1}


# With the scheduler --------------------------------------------------------------------------------------------------


class TimedWorld:
    """A World whose tasks take a given time and run in parallel."""

    def __init__(self, world, denoise_s, decode_s):
        self.world, self.seconds = world, {Stage.ENCODE: 0.1, Stage.DENOISE: denoise_s, Stage.DECODE: decode_s}
        self.ends = {}

    def work(self, until):
        """Let tasks end in the order of their times until `until()` holds."""
        world = self.world
        while not until():
            while world.starting:
                world.ready(world.starting[0])
            for worker, keys in world.running.items():
                self.ends.setdefault((worker, keys), world.now + self.seconds[worker.stage] * len(keys))
            self.ends = {task: end for task, end in self.ends.items() if world.running.get(task[0]) == task[1]}
            (worker, _), end = min(self.ends.items(), key=lambda task: task[1])
            for other in world.running:
                world.feed(Heartbeat(other))
            world.tick(max(0.0, end - world.now))
            world.done(worker)
        return self

    def decoders(self):
        world = self.world
        return {w for w in (*world.starting, *world.idle, *world.running) if w.stage is Stage.DECODE}


def test_an_auto_pool_grows_and_shrinks_during_a_run():
    """Scaling: an `auto` pool starts with one decoder, grows once decode times are known, and releases decoders, idle
    ones first, minutes after decodes have become short. No worker counts as lost.
    """
    world = World(limits(groups=4) | {Stage.DECODE: auto(8)}, plan_of(240))
    timed = TimedWorld(world, denoise_s=30.0, decode_s=24.0)
    timed.work(lambda: world.committed)
    assert len(timed.decoders()) == 1
    timed.work(lambda: world.now > 200.0)
    assert len(timed.decoders()) == 4
    timed.seconds[Stage.DECODE] = 1.0
    changed = world.now
    timed.work(lambda: len(timed.decoders()) < 4)
    assert world.now - changed >= SHRINK_AFTER_S
    timed.work(lambda: len(timed.decoders()) == 1)
    assert not world.killed
    timed.work(lambda: world.finish)
    assert len(world.committed) == 240


def test_a_pool_whose_only_worker_never_starts_ends_the_run():
    """P6: the spare slots of an `auto` pool do not add starts of a decoder that cannot start."""
    world = World(limits(groups=2) | {Stage.DECODE: auto(4)}, plan_of(3))
    losses = 0
    while not world.abort:
        if doomed := [worker for worker in world.starting if worker.stage is Stage.DECODE]:
            world.lost(doomed[0], FailureClass.INFRA)
            losses += 1
        else:
            world.tick(100.0)
    assert "VAE decoder" in world.abort.failure.message
    assert losses == RETRIES.worker


@pytest.mark.parametrize("lost", [1, 2])
def test_an_abandoned_decoder_is_replaced(lost):
    """P5: in an `auto` pool, another slot replaces an abandoned one while other decoders work."""
    world = World(limits(groups=4) | {Stage.DECODE: auto(8)}, plan_of(100))
    timed = TimedWorld(world, denoise_s=10.0, decode_s=8.0).work(lambda: world.now > 100.0)
    for victim in sorted(timed.decoders())[:lost]:
        slot = victim.slot
        for _ in range(RETRIES.worker):
            alive = [worker for worker in timed.decoders() if worker.slot == slot]
            while not alive:
                world.tick(10.0)
                alive = [worker for worker in world.starting if worker.slot == slot]
            world.lost(alive[0], FailureClass.INFRA)
    timed.work(lambda: world.now > 200.0)
    assert len(timed.decoders()) == 4
    timed.work(lambda: world.finish)
    assert len(world.committed) + len(world.quarantined) == 100
