"""hv_batch.job.scheduling.scheduler: its invariants hold under any history of events."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling import backpressure
from hv_batch.job.scheduling.limits import OUTAGE_LIMIT_S, OUTAGE_PAUSE_S, StageLimits
from hv_batch.job.scheduling.messages import (
    Admitted,
    Finish,
    Heartbeat,
    StopRequested,
    TaskDone,
    TaskFailed,
    WorkerId,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from hv_batch.job.scheduling.object_store_budget import ASSUMED_EMBEDDING_BYTES
from hv_batch.job.scheduling.worker_slots import MAX_BACKOFF_S
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload
from tests.support.scheduler_world import CHARGED_KINDS, MIB, RETRIES, STALL_S, World, limits, plan_of


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_each_sample_leaves_exactly_once_in_any_history(data):
    """P1, P4, P5, P7: through any failures, preemptions and releases, each sample is committed or quarantined once,
    within queues that are bounded in samples and in bytes.
    """
    workers = [data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))]
    stages = limits(
        *workers,
        batch=data.draw(st.integers(1, 4)),
        result_bytes=data.draw(st.sampled_from([1, 8 * MIB, 20 * MIB, math.inf])),
        colocated=data.draw(st.booleans()),
        ranks=data.draw(st.sampled_from([(1,), (1,), (8,), (2, 1), (8, 1), (8, 4, 2)])),
        micro_batch=data.draw(st.integers(1, 4)),
    )
    begins = data.draw(st.lists(st.sampled_from([Stage.ENCODE, Stage.ENCODE, Stage.DECODE]), max_size=15))
    size_classes = st.integers(0, len(stages[Stage.DENOISE].sizes) - 1)
    works = st.sampled_from([Workload((64, 64, 1), 2, 1), Workload((128, 128, 1), 2, 1)])
    world = World(
        stages,
        [
            Admitted(f"s{i}", stage, MIB * data.draw(st.integers(1, 16)), data.draw(size_classes), data.draw(works))
            for i, stage in enumerate(begins)
        ],
        embedding_bytes={f"s{i}": MIB * data.draw(st.integers(1, 8)) for i in range(len(begins))},
    )
    may_stop = data.draw(st.booleans())
    for _ in range(data.draw(st.integers(0, 60))):
        if world.finish or world.abort:
            break
        choices = [("tick", None), *(("ready", w) for w in world.starting), *(("lost", w) for w in world.starting)]
        choices += [(what, w) for w in sorted(world.running) for what in ("done", "failed", "lost")]
        choices += [(what, w) for w in sorted(world.idle) for what in ("lost", "leave")]
        choices += [("leave", w) for w in (*world.starting, *sorted(world.running))]
        choices += [("spool", w) for w, (key, *_) in sorted(world.running.items()) if world.at[key] is Stage.DECODE]
        choices += [(what, key) for key in sorted(world.spooled) for what in ("publish", "lose_spooled")]
        choices += [("stop", None)] if may_stop and world.stopped_at is None else []
        what, worker = data.draw(st.sampled_from(choices))
        if what == "leave":
            world.leave(worker, data.draw(st.sampled_from([1.0, 20.0, 120.0, math.inf])))
        elif what in ("failed", "lost"):
            kinds = [*CHARGED_KINDS, FailureClass.OUTAGE] if world.running.get(worker) else CHARGED_KINDS
            getattr(world, what)(worker, data.draw(st.sampled_from(kinds)))
        elif what == "lose_spooled":
            world.lose_spooled(worker, data.draw(st.sampled_from([Stage.DECODE, Stage.ENCODE])))
        elif what == "stop":
            world.feed(StopRequested())
        elif what == "tick":
            world.tick(data.draw(st.sampled_from([0.1, 5.0, 2 * STALL_S])))
        else:
            getattr(world, what)(worker)
    assert_announced_groups_come(world)
    world.run_to_end()
    if world.abort:
        assert "in a row" in world.abort.failure.message or world.now > OUTAGE_LIMIT_S
    elif world.stopped_at is not None:
        assert world.finish.drained == bool(world.at or world.queue or world.spooled)
        if world.now < world.stopped_at + world.drain_timeout_s:
            assert Stage.DECODE not in world.at.values(), "latents were left though a decoder could run"
    else:
        assert world.finish == Finish(drained=False)
        assert sorted(world.committed + world.quarantined) == sorted(a.key for a in world.plan)


def assert_announced_groups_come(world):
    """P4: reservations are retained for groups to come, so an announced group must start without a further event."""

    def none_announced():
        return not any(world.scheduler.groups_to_come(world.now))

    if not none_announced():
        waiting = [worker for worker in world.starting if worker.stage is Stage.DENOISE]
        world.pass_time_until(MAX_BACKOFF_S + OUTAGE_PAUSE_S, none_announced)
        started = [worker for worker in world.starting if worker.stage is Stage.DENOISE and worker not in waiting]
        assert started or world.finish or world.abort


def denoising(world):
    return sorted(worker for worker in world.running if worker.stage is Stage.DENOISE)


def until_denoising(world, groups):
    while len(denoising(world)) < groups and not world.quarantined:
        early = [worker for worker in world.running if worker.stage is Stage.ENCODE]
        world.ready(world.starting[0]) if world.starting else world.done(early[0])


def test_no_group_is_announced_without_work():
    """P4: at the tail of a run, and in a drain, the reservation of a lost group can be released."""
    world = World(limits(groups=2, batch=1), plan_of(2))
    until_denoising(world, groups=2)
    assert world.scheduler.groups_to_come(world.now) == [0], "both groups exist"
    while not world.quarantined:
        world.lost(denoising(world)[0], FailureClass.INFRA)
        until_denoising(world, groups=2)
    assert denoising(world), "the other sample is rendered by the other group"
    assert world.scheduler.groups_to_come(world.now) == [0]
    world.feed(StopRequested())
    world.lost(denoising(world)[0], FailureClass.INFRA)
    assert world.scheduler.groups_to_come(world.now) == [0]


def test_undisturbed_run_does_each_stage_once():
    """P2: without failures each sample is encoded, denoised and decoded exactly once."""
    world = World(limits(), plan_of(20))
    world.run_to_end()
    assert sorted(world.committed) == sorted(f"s{i}" for i in range(20))
    assert set(world.runs.values()) == {1}


def test_a_finished_plan_starts_no_worker():
    """P2: a second run over a finished output root starts no worker."""
    world = World(limits(), [])
    assert world.finish == Finish(drained=False)
    assert not world.starting


def test_stored_latents_need_only_decoders():
    """P4: samples whose final latents are stored start neither encoder nor group."""
    world = World(limits(), plan_of(3, Stage.DECODE))
    assert {worker.stage for worker in world.starting} == {Stage.DECODE}
    world.run_to_end()
    assert len(world.committed) == 3


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


def denoise_tasks(world, seconds):
    """Run to the end and return the keys of each denoise in order. `seconds`: of one sample's denoise, by workload."""
    work = {begun.key: begun.work for begun in world.plan}
    tasks = []
    while not (world.finish or world.abort):
        if world.starting:
            world.ready(world.starting[0])
            continue
        worker, keys = next(iter(world.running.items()))
        if worker.stage is Stage.DENOISE:
            tasks.append(keys)
            world.tick(sum(seconds[work[key]] for key in keys))
        world.done(worker)
    return tasks


def test_quick_samples_share_tasks():
    """Micro-batches: samples of a workload that is measured to be quick share tasks; slow samples, and samples of an
    unknown workload, run alone. Each sample is rendered once.
    """
    quick, slow = Workload((64, 64, 1), 2, 1), Workload((720, 1280, 129), 50, 1)
    plan = [Admitted(f"s{i:02}", work=slow if i % 10 == 9 else quick) for i in range(60)]
    world = World(limits(groups=1, batch=8, micro_batch=16), plan)
    tasks = denoise_tasks(world, {quick: 0.1, slow: 9.0})
    assert sorted(world.committed) == [begun.key for begun in plan]
    assert set(world.runs.values()) == {1}
    alone = [keys[0] for keys in tasks if len(keys) == 1]
    assert {begun.key for begun in plan if begun.work == slow} <= set(alone)
    assert max(map(len, tasks)) == 5, "MICRO_BATCH_SECONDS of samples"
    assert len(tasks[0]) == len(tasks[1]) == 1, "no estimate exists before the worker's second task ends"


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


def drive(world, bad):
    """Run to the end. `bad(worker, keys)` returns the failure of a task as (World method, failure class), or None."""
    for _ in range(10_000):
        if world.finish or world.abort:
            return
        if world.starting:
            world.ready(world.starting[0])
        elif world.running:
            worker, keys = next(iter(world.running.items()))
            fault = bad(worker, keys)
            getattr(world, fault[0])(worker, fault[1]) if fault else world.done(worker)
        else:
            world.tick(5.0)
    pytest.fail("the run did not end")


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


def test_groups_are_placed_before_single_actors():
    """P33: an actor with one GPU must not block a node that a whole group needs."""
    world = World(limits(), plan_of(4), has_room=False)
    assert {worker.stage for worker in world.starting} == {Stage.DENOISE}
    world.feed(WorkerPlaced(world.starting[0]))
    assert {worker.stage for worker in world.starting} == set(Stage)


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


def work_without_decoding(world):
    """Let starts, encodings and denoises succeed until only decodes run."""
    for _ in range(1000):
        able = [worker for worker in world.running if worker.stage is not Stage.DECODE]
        if not (world.starting or able):
            return
        world.ready(world.starting[0]) if world.starting else world.done(able[0])
    pytest.fail("the groups never stopped")


@pytest.mark.parametrize(("share", "most"), [(math.inf, 5), (2 * MIB, 4), (1, 2)])
def test_a_slow_decoder_stops_the_groups_before_the_store_is_full(share, most):
    """P7: each of two groups has as many results as its budget allows, or one, including those being decoded."""
    stages = limits(groups=2, decoders=1, result_bytes=share) | {
        Stage.DECODE: StageLimits(workers=1, ahead=4, task_timeout_s=STALL_S)
    }
    world = World(stages, [Admitted(f"s{i}", Stage.ENCODE, MIB) for i in range(12)])
    work_without_decoding(world)
    denoised = sum(stage is Stage.DENOISE for stage, _ in world.runs)
    assert denoised == most
    world.run_to_end()
    assert len(world.committed) == 12


def test_stored_latents_take_no_budget():
    """P4, P7: latents that a decoder reads from the output root do not block a group."""
    plan = [Admitted(f"stored{i}", Stage.DECODE, MIB) for i in range(2)] + [Admitted("new", Stage.ENCODE, MIB)]
    world = World(limits(groups=1, result_bytes=MIB), plan)
    work_without_decoding(world)
    assert world.runs[Stage.DENOISE, "new"] == 1


def test_the_largest_embedding_is_the_expected_size():
    """P7: the expected size of the next embeddings is the largest size so far."""
    share = 3 * ASSUMED_EMBEDDING_BYTES
    keys = [f"s{i}" for i in range(8)]
    world = World(
        limits(groups=1, batch=4, result_bytes=share),
        [Admitted(key) for key in keys],
        embedding_bytes=dict.fromkeys(keys, share),
    )
    batches = []
    while not world.finish:
        if world.starting:
            world.ready(world.starting[0])
            continue
        worker, task = next(iter(world.running.items()))
        if worker.stage is Stage.ENCODE:
            batches.append(len(task))
        world.done(worker)
    assert batches == [3, 1, 1, 1, 1, 1]


def test_stale_events_change_nothing():
    """An event of an earlier incarnation of a worker is ignored."""
    world = World(limits(groups=1), plan_of(2))
    first = next(w for w in world.starting if w.stage is Stage.DENOISE)
    world.lost(first, FailureClass.INFRA)
    assert first in {WorkerId(first.stage, first.slot, 0)}
    for stale in (WorkerReady(first), TaskDone(first), WorkerLost(first, Failure(FailureClass.FATAL, "late"))):
        world.feed(stale)
    assert not world.abort
    world.run_to_end()
    assert len(world.committed) == 2


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


def test_lost_latents_begin_anew():
    """P4: a sample whose stored latents are lost is rendered from the start."""
    world = World(limits(groups=1), plan_of(1, Stage.DECODE))
    world.ready(world.starting[0])
    (decoder,) = world.running
    world.running.pop(decoder)
    world.idle.add(decoder)
    world.at["s0"] = Stage.ENCODE
    world.feed(TaskFailed(decoder, Failure(FailureClass.INFRA, "no latents", begin_anew=True)))
    world.run_to_end()
    assert world.committed == ["s0"]
    assert world.runs[Stage.DENOISE, "s0"] == 1


def test_encoders_take_full_batches_while_groups_have_work():
    """Backpressure: a batch takes hardly longer than one sample, so an encoder waits for room for a full one, unless a
    group is idle.
    """
    world = World(limits(groups=2, batch=4), plan_of(60))
    batches = []
    while not world.finish:
        if world.starting:
            world.ready(world.starting[0])
            continue
        encoding = [worker for worker in world.running if worker.stage is Stage.ENCODE]
        batches += [len(world.running[worker]) for worker in encoding]
        world.done((encoding or list(world.running))[0])
        idle = {worker.stage for worker in world.idle}
        for_groups = sum(at is Stage.DENOISE for at in world.at.values()) - len(denoising(world))
        assert not idle >= {Stage.ENCODE, Stage.DENOISE} or for_groups or Stage.ENCODE not in world.at.values()
    assert batches == [4] * 15
