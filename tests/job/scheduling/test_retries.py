"""hv_batch.job.scheduling.retries: what a failure costs its sample and its worker."""

from __future__ import annotations

import math

import pytest

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import (
    Heartbeat,
    WorkerLost,
)
from hv_batch.job.scheduling.workers.worker_slots import MAX_BACKOFF_S
from hv_batch.job.stages import Stage
from tests.support.scheduler_world import (
    CHARGED_KINDS,
    RETRIES,
    STALL_S,
    World,
    denoising,
    drive,
    limits,
    plan_of,
    until_denoising,
)


@pytest.mark.parametrize(("kind", "tries"), [(k, RETRIES.tries(k)) for k in CHARGED_KINDS])
def test_a_sample_is_quarantined_after_its_budget(kind, tries):
    """P5: a sample that always fails is quarantined after its tries; the others are rendered."""
    world = World(limits(groups=1), plan_of(4))
    while not (world.finish or world.abort):
        if world.starting:
            world.ready(world.starting[0])
        elif bad := [w for w, task in world.running.items() if w.stage is Stage.DENOISE and task == ("s1",)]:
            world.lost(bad[0], kind)
        elif world.running:
            world.done(next(iter(world.running)))
        else:
            world.tick(30.0)
    assert world.finish
    assert world.quarantined == ["s1"]
    assert sorted(world.committed) == ["s0", "s2", "s3"]
    assert [failure.kind for failure in world.quarantines[0].failures] == [kind] * tries


def test_a_failed_batch_is_tried_one_by_one():
    """P5: the members of a failed batch are not charged; alone, the faulty sample is found."""
    world = World(limits(batch=3), plan_of(3))
    while not world.finish:
        if world.starting:
            world.ready(world.starting[0])
            continue
        worker, keys = next(iter(world.running.items()))
        if worker.stage is Stage.ENCODE and "s1" in keys:
            world.failed(worker, FailureClass.POISON)
        else:
            world.done(worker)
    assert world.quarantined == ["s1"]
    assert len(world.quarantines[0].failures) == RETRIES.poison
    assert sorted(world.committed) == ["s0", "s2"]


def test_a_lost_micro_batch_charges_no_sample():
    """P5: its samples are tried again alone, so that the faulty one is found; the others are committed."""
    world = World(limits(groups=1, batch=8, micro_batch=16), plan_of(40))
    seen = []

    def bad(worker, keys):
        if worker.stage is Stage.DENOISE and "s20" in keys:
            seen.append(len(keys))
            return "lost", FailureClass.INFRA
        return None

    drive(world, bad)
    assert seen[0] > 1, "the sample was in no micro-batch"
    assert seen[1:] == [1] * RETRIES.infra
    assert world.quarantined == ["s20"]
    assert len(world.committed) == 39


def test_groups_that_never_start_end_the_run():
    """P6: a run with a stage of abandoned slots ends with an error and does not wait forever."""
    world = World(limits(groups=2), plan_of(3))
    while not world.abort:
        groups = [w for w in world.starting if w.stage is Stage.DENOISE]
        if groups:
            world.lost(groups[0], FailureClass.INFRA)
        else:
            world.tick(100.0)
    assert "denoise group" in world.abort.failure.message
    assert "lost" in world.abort.failure.message


@pytest.mark.parametrize("excluded_nodes", [RETRIES.worker - 1, RETRIES.worker])
def test_a_node_that_is_excluded_counts_once(excluded_nodes):
    """P5, P6: a node that is excluded after two failed starts counts as one loss of the slot. After three such nodes in
    a row the fourth renders. Four in a row abandon the slot, and the run ends.
    """
    world = World(limits(groups=1), plan_of(3))
    for failed_starts in range(2 * excluded_nodes):
        if not world.abort:
            group = next(worker for worker in world.starting if worker.stage is Stage.DENOISE)
            world.feed(WorkerLost(group, Failure(FailureClass.INFRA, "no device"), counts=failed_starts % 2 == 0))
            world.tick(MAX_BACKOFF_S)
    world.run_to_end()
    if excluded_nodes < RETRIES.worker:
        assert len(world.committed) == 3
    else:
        assert "every denoise group was lost 4 times in a row" in world.abort.failure.message


def test_samples_that_kill_their_group_do_not_use_it_up():
    """P5: a slot counts each sample once, so samples that kill in turns are quarantined and the run continues."""
    world = World(limits(groups=1), plan_of(8))
    killers = {("s2",), ("s3",)}
    drive(world, lambda w, k: ("lost", FailureClass.INFRA) if w.stage is Stage.DENOISE and k in killers else None)
    assert world.finish
    assert sorted(world.quarantined) == ["s2", "s3"]
    assert len(world.committed) == 6


def test_a_batch_with_a_killer_does_not_use_up_the_encoder():
    """P5: the loss of a batch does not count; the killing sample is found alone and quarantined."""
    world = World(limits(batch=4), plan_of(8))
    drive(world, lambda w, k: ("lost", FailureClass.INFRA) if w.stage is Stage.ENCODE and "s7" in k else None)
    assert world.finish
    assert world.quarantined == ["s7"]
    assert len(world.committed) == 7


def test_different_samples_that_kill_a_lone_group_end_the_run():
    """P6: a group that is lost with each of its samples is abandoned, and without another group the run ends."""
    world = World(limits(groups=1), plan_of(20))
    drive(world, lambda w, k: ("lost", FailureClass.INFRA) if w.stage is Stage.DENOISE else None)
    assert world.abort
    assert len(world.quarantined) < RETRIES.worker + 1


def test_a_worker_on_which_everything_fails_is_rebuilt():
    """P5: a worker that survives three failures of different samples in a row is rebuilt."""
    world = World(limits(groups=1), plan_of(12))
    drive(
        world, lambda w, k: ("failed", FailureClass.POISON) if w.stage is Stage.DECODE and w.incarnation == 0 else None
    )
    assert world.finish
    assert len(world.quarantined) <= 3, "only samples with both tries before the rebuild"
    assert len(world.committed) >= 9


def test_a_group_whose_inputs_were_lost_with_a_node_is_not_rebuilt():
    """P5: the embeddings of many waiting samples are lost at once. Neither the group nor the samples are to blame."""
    world, lost, groups = World(limits(groups=1), plan_of(12)), set(), set()

    def first_input(worker, keys):
        if worker.stage is Stage.DENOISE:
            groups.add(worker.incarnation)
            if not lost.issuperset(keys):
                lost.update(keys)
                return "failed", FailureClass.PREEMPTED
        return None

    drive(world, first_input)
    assert world.finish
    assert len(lost) == len(world.committed) == 12
    assert groups == {0}


def test_a_faulty_node_does_not_end_a_proven_run():
    """P5: if the same config has started before, a FATAL start failure is a failure of the node."""
    world = World(limits(groups=2), plan_of(6))
    for _ in range(3):
        world.ready(world.starting[0])
    second = next(worker for worker in world.starting if worker.stage is Stage.DENOISE)
    world.lost(second, FailureClass.FATAL)
    assert not world.abort
    world.run_to_end()
    assert len(world.committed) == 6


def test_fatal_failure_aborts_at_once():
    """Design section 6: a FATAL failure aborts the run."""
    world = World(limits(), plan_of(3))
    world.lost(world.starting[0], FailureClass.FATAL)
    assert world.abort
    assert world.abort.failure.kind is FailureClass.FATAL


def test_a_hung_task_is_killed_and_retried():
    """P4: without a heartbeat for the stall time the worker is killed and its sample tried again."""
    world = World(limits(groups=1), plan_of(1))
    for _ in range(3):
        world.ready(world.starting[0])
    world.done(next(iter(world.running)))
    (group,) = world.running
    world.tick(STALL_S - 1)
    world.feed(Heartbeat(group))
    world.tick(STALL_S - 1)
    assert group in world.running, "a heartbeat restarts the timeout"
    world.tick(2)
    assert group not in world.running
    world.run_to_end()
    assert world.committed == ["s0"]


def test_a_step_that_is_overdue_is_a_hang():
    """P4: a worker that misses the announced time of its next heartbeat is killed before the stall time. Without an
    announcement, or with a longer one, the stall time is valid.
    """
    world = World(limits(groups=1), plan_of(2))
    until_denoising(world, groups=1)
    (group,) = denoising(world)
    for next_within_s, waited_s in ((math.inf, STALL_S), (2 * STALL_S, STALL_S), (10.0, 10.0)):
        world.feed(Heartbeat(group, next_within_s))
        world.tick(waited_s)
        assert group in world.running
    world.tick(1.0)
    assert world.killed[group].kind is FailureClass.INFRA
    assert "no progress for 10 s" in world.killed[group].message
    until_denoising(world, groups=1)
    world.tick(STALL_S)
    assert denoising(world), "the announcement is not valid for another task"
