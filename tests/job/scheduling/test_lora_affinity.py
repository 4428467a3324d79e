"""A group prefers samples with the LoRAs that its weights have, and no sample waits forever for that."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.failure import FailureClass
from hv_batch.job.scheduling.messages import Admitted
from hv_batch.job.scheduling.queues import MAX_OVERTAKES
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import World, limits


def samples(loras):
    return [Admitted(f"s{i:04d}", lora=lora) for i, lora in enumerate(loras)]


def render_all(loras, groups=1, **kwargs):
    """Render everything; returns the LoRAs of each denoise in order, by group, and the keys in order."""
    world, denoised, order = World(limits(groups=groups, **kwargs), samples(loras)), {}, []
    by_key = {f"s{i:04d}": lora for i, lora in enumerate(loras)}
    for _ in range(20 * len(loras) + 100):
        if world.finish:
            break
        if world.starting:
            world.ready(world.starting[0])
            continue
        worker = min(world.running, key=str)
        if worker.stage is Stage.DENOISE:
            keys = world.running[worker]
            assert len({by_key[key] for key in keys}) == 1, "a task mixes LoRAs"
            denoised.setdefault(worker.slot, []).append(by_key[keys[0]])
            order.extend(keys)
        world.done(worker)
    assert len(world.committed) == len(loras)
    return denoised, order


def changes(loras, before=""):
    return sum(one != other for one, other in zip([before, *loras], loras, strict=False))


def test_alternating_samples_do_not_change_the_weights_each_time():
    loras = ["film", "grain"] * 60
    denoised, _ = render_all(loras, batch=8)
    assert changes(denoised[0]) < len(loras) / 4


def test_two_groups_share_two_loras():
    denoised, _ = render_all(["film", "grain"] * 60, groups=2, batch=8)
    assert sum(changes(own) for own in denoised.values()) < 120 / 4


def test_without_loras_the_order_is_that_of_admission():
    _, order = render_all([""] * 40)
    assert order == sorted(order)


def test_a_sample_is_overtaken_a_bounded_number_of_times():
    """P5: one sample with other LoRAs does not wait for the end of the manifest."""
    _, order = render_all(["film"] * 5 + ["grain"] + ["film"] * 400)
    assert order.index("s0005") <= 5 + MAX_OVERTAKES


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["", "film", "grain"]), max_size=60), st.integers(1, 3))
def test_every_sample_is_rendered_once_whatever_its_loras(loras, groups):
    render_all(loras, groups=groups)


def test_a_rebuilt_group_has_the_weights_of_the_checkpoint():
    """The loss of a group also loses its LoRAs."""
    world = World(limits(groups=1, batch=4), samples(["film"] * 4))
    while not any(worker.stage is Stage.DENOISE for worker in world.running):
        world.ready(world.starting[0]) if world.starting else world.done(next(iter(world.running)))
    (slot,) = [slot for slot in world.scheduler._scaling if slot.id.stage is Stage.DENOISE]
    assert slot.lora == "film"
    world.lost(slot.id, FailureClass.INFRA)
    assert slot.lora == ""
