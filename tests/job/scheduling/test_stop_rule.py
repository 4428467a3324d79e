"""A fault that all samples share ends the run instead of quarantining its whole manifest."""

from __future__ import annotations

import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.capacity import retry_limits
from hv_batch.job.scheduling.messages import Abort, Quarantine, TaskFailed, WorkerId
from hv_batch.job.scheduling.retries import MAX_FAULTS, StopRule
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import RETRIES, World, advance, limits, plan_of

POISON, INFRA, FATAL = FailureClass.POISON, FailureClass.INFRA, FailureClass.FATAL


def failing_world(groups=2, samples=40, message="latents are not finite after step 1 of 50: seed {}"):
    """Every denoise raises; the messages differ in numbers only. Returns the world when the run has ended."""
    world = World(limits(groups=groups), plan_of(samples))
    fail_all(world, message)
    return world


def fail_all(world, message):
    for number in range(2000):
        if world.abort or world.finish:
            return
        if world.starting:
            world.ready(world.starting[0])
        elif group := next((worker for worker in world.running if worker.stage is Stage.DENOISE), None):
            keys = world.running.pop(group)
            world.idle.add(group)
            world.put_back(keys)
            world.feed(TaskFailed(group, Failure(POISON, message.format(number))))
        elif world.running:
            world.done(next(iter(world.running)))
        else:
            world.tick(1.0)
    pytest.fail("the run did not end")


@pytest.mark.parametrize(("groups", "samples_alike"), [(1, 8), (2, 8), (12, 12)])
def test_a_fault_of_every_sample_ends_the_run_with_that_error(groups, samples_alike):
    """P5, P6: wrong weights must not quarantine the manifest and end in _SUCCESS."""
    world = failing_world(groups)
    failure = world.abort.failure
    assert failure.kind is FATAL
    assert f"nothing has been committed, and {samples_alike} different samples failed alike, with POISON" in (
        failure.message
    )
    assert "latents are not finite after step 1" in failure.message
    assert len(world.quarantined) < samples_alike


def test_the_message_counts_what_is_quarantined_already():
    """With few samples in flight, some are quarantined before the rule is met; the message says how to render them."""
    rule, failure = StopRule(RETRIES), Failure(POISON, "broken")
    stops = [note(rule, n % 2, f"s{n}", failure, quarantined=n % 2) for n in range(8)]
    assert "4 of them are quarantined already; when this is fixed, `--failed-only` renders" in stops[-1].message


def test_one_commit_proves_the_run():
    """After a commit, failures belong to their samples, however many there are."""
    world = World(limits(groups=2), plan_of(40))
    advance(world, lambda world: world.committed)
    fail_all(world, "not finite")
    assert world.finish
    assert not world.abort
    assert len(world.committed) + len(world.quarantined) == 40


def test_a_commit_of_an_earlier_run_counts():
    """The rule is about the output root, not about the command."""
    world = World(limits(groups=2), plan_of(20))
    world.scheduler.note_commit()
    fail_all(world, "not finite")
    assert world.finish
    assert len(world.quarantined) == 20


def note(rule, slot, key, failure, *, quarantined=0, ready=(0, 1), stage=Stage.DENOISE):
    return rule.note_failure(WorkerId(stage, slot, 0), [key], failure, quarantined, lambda slots: len({*ready, *slots}))


def test_failures_of_one_worker_are_not_failures_of_the_run():
    """The other worker may be healthy: the rule waits until it has failed too."""
    rule, failure = StopRule(RETRIES), Failure(POISON, "broken")
    assert not any(note(rule, 0, f"s{n}", failure) for n in range(20))
    assert note(rule, 1, "s20", failure).kind is FATAL
    assert note(StopRule(RETRIES), 0, "s", failure, ready=()) is None


def test_different_errors_are_not_one_fault():
    """The class, the text and the stage must be equal; numbers, addresses and the key may differ."""
    rule = StopRule(RETRIES)
    for number in range(7):
        assert not note(
            rule, number % 2, f"s{number}", Failure(POISON, f"s{number}: at 0x7f{number}abc0123 of {number}.5")
        )
    assert not note(rule, 0, "s7", Failure(POISON, "another text"))
    assert not note(rule, 0, "s7", Failure(FailureClass.GPU_OOM, "s7: at 0x7f1abc0123 of 1.5"))
    assert not note(rule, 0, "s7", Failure(POISON, "s7: at 0x7f1abc0123 of 1.5"), stage=Stage.DECODE)
    assert not note(rule, 0, "s6", Failure(POISON, "s6: at 0x7f1abc0123 of 1.5"))  # the same sample again
    assert note(rule, 0, "s8", Failure(POISON, "s8: at 0x7f1abc0123 of 9"))


def test_lost_nodes_do_not_end_a_run():
    """P5: a node takes many samples with it at one moment. Only samples that INFRA has quarantined count."""
    rule, lost = StopRule(RETRIES), Failure(INFRA, "the actor died")
    assert not any(note(rule, n % 8, f"s{n}", lost, ready=range(8)) for n in range(50))
    results = [note(rule, n % 8, f"s{n}", lost, quarantined=1, ready=range(8)) for n in range(8)]
    assert results[-1].kind is FATAL
    assert not any(results[:-1])


def test_what_the_rule_remembers_is_bounded():
    """P7: a run in which every sample fails in another way remembers a bounded number of messages."""
    rule = StopRule(RETRIES)
    for number in range(1000):
        note(rule, 0, "s", Failure(POISON, "x" * number))
    assert len(rule._faults) == MAX_FAULTS


def retries(samples, **changes):
    return retry_limits(RunConfig.model_validate({"retries": changes}), samples)


def test_a_run_that_goes_wrong_later_stops_at_the_limit():
    """`retries.max_quarantined` is a number, or a share of the samples; one more sample ends the run."""
    assert retries(1000).max_quarantined is None
    assert retries(1000, max_quarantined=5).max_quarantined == 5
    assert retries(1000, max_quarantined=0.025).max_quarantined == 25
    rule = StopRule(retries(1000, max_quarantined=3))
    rule.note_commit()
    assert not any(note(rule, 0, f"s{n}", Failure(POISON, str(n)), quarantined=1) for n in range(3))
    failure = note(rule, 0, "s3", Failure(POISON, "broken prompt"), quarantined=1)
    assert failure.kind is FATAL
    assert "4 samples are quarantined in this run, and retries.max_quarantined allows 3" in failure.message
    assert "broken prompt" in failure.message


def test_the_quarantine_of_the_last_sample_precedes_the_end():
    """P1: the sample that reaches the limit gets its record."""
    world = World(limits(groups=1), plan_of(3))
    world.scheduler._stop_rule = StopRule(retries(3, max_quarantined=0))
    actions = []
    carry_out_one = world.carry_out_one
    world.carry_out_one = lambda action: (actions.append(action), carry_out_one(action))
    fail_all(world, "broken")
    assert [type(action) for action in actions[-2:]] == [Quarantine, Abort]


@pytest.mark.parametrize("value", [-1, 1.5, 0.0, True, "5%"])
def test_a_wrong_limit_is_refused_with_the_allowed_values(value):
    """P6: one message for the whole union."""
    with pytest.raises(ValueError, match="a whole number of at least 0, a share above 0 and below 1, or null"):
        RunConfig.model_validate({"retries": {"max_quarantined": value}})
