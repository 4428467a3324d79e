"""The scheduler under generated histories: whatever the world answers, the invariants of its docstring hold."""

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
from tests.support.scheduler_world import BLAMED, MIB, RETRIES, STALL_S, World, limits, plan_of


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_history_ends_with_each_sample_gone_once(data):
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
            kinds = [*BLAMED, FailureClass.OUTAGE] if world.running.get(worker) else BLAMED
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
    world.calm_down()
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
    """P4: seats are kept for groups that will come, so a group that is announced comes, without other news."""

    def over():
        return not any(world.scheduler.groups_to_come(world.now))

    if not over():
        waiting = [worker for worker in world.starting if worker.stage is Stage.DENOISE]
        world.idle_away(MAX_BACKOFF_S + OUTAGE_PAUSE_S, over)
        started = [worker for worker in world.starting if worker.stage is Stage.DENOISE and worker not in waiting]
        assert started or world.finish or world.abort


def denoising(world):
    return sorted(worker for worker in world.running if worker.stage is Stage.DENOISE)


def until_denoising(world, groups):
    while len(denoising(world)) < groups and not world.quarantined:
        early = [worker for worker in world.running if worker.stage is Stage.ENCODE]
        world.ready(world.starting[0]) if world.starting else world.done(early[0])


def test_no_group_is_announced_that_nothing_is_left_for():
    """P4: at the end of a run, or in a drain, the seats of a lost group are free for others."""
    world = World(limits(groups=2, batch=1), plan_of(2))
    until_denoising(world, groups=2)
    assert world.scheduler.groups_to_come(world.now) == [0], "both are there"
    while not world.quarantined:
        world.lost(denoising(world)[0], FailureClass.INFRA)
        until_denoising(world, groups=2)
    assert denoising(world), "the other sample is rendered by the other group"
    assert world.scheduler.groups_to_come(world.now) == [0]
    world.feed(StopRequested())
    world.lost(denoising(world)[0], FailureClass.INFRA)
    assert world.scheduler.groups_to_come(world.now) == [0]


def test_undisturbed_run_does_each_station_once():
    """P2: without failures each sample is encoded, denoised and decoded exactly once."""
    world = World(limits(), plan_of(20))
    world.calm_down()
    assert sorted(world.committed) == sorted(f"s{i}" for i in range(20))
    assert set(world.runs.values()) == {1}


def test_a_finished_plan_starts_no_worker():
    """P2: a second run over a finished output takes no resource at all."""
    world = World(limits(), [])
    assert world.finish == Finish(drained=False)
    assert not world.starting


def test_stored_latents_need_only_decoders():
    """P4: samples whose final latents are stored start neither encoder nor group."""
    world = World(limits(), plan_of(3, Stage.DECODE))
    assert {worker.stage for worker in world.starting} == {Stage.DECODE}
    world.calm_down()
    assert len(world.committed) == 3


@pytest.mark.parametrize(("kind", "tries"), [(k, RETRIES.tries(k)) for k in BLAMED])
def test_a_sample_is_quarantined_after_its_budget(kind, tries):
    """P5: one sample that always fails ends in quarantine after its budget; the others are rendered."""
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
    """P5: the members of a failed batch are not charged for it, and the bad one is found."""
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
    """Run to the end, and what each denoise took, in order. Each sample's takes so long, by its work; else no time."""
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


def test_quick_samples_travel_together():
    """Stages: once a kind of sample is known to be quick, groups share out what waits, and each takes several; slow
    ones, and kinds that nobody knows yet, go one by one. Nothing is rendered twice or left.
    """
    quick, slow = Workload((64, 64, 1), 2, 1), Workload((720, 1280, 129), 50, 1)
    plan = [Admitted(f"s{i:02}", work=slow if i % 10 == 9 else quick) for i in range(60)]
    world = World(limits(groups=1, batch=8, micro_batch=16), plan)
    tasks = denoise_tasks(world, {quick: 0.1, slow: 9.0})
    assert sorted(world.committed) == [begun.key for begun in plan]
    assert set(world.runs.values()) == {1}
    alone = [keys[0] for keys in tasks if len(keys) == 1]
    assert {begun.key for begun in plan if begun.work == slow} <= set(alone)
    assert max(map(len, tasks)) == 5, "half a second's worth"
    assert len(tasks[0]) == len(tasks[1]) == 1, "nothing is known before a worker's second task"


def test_a_parcel_that_is_lost_charges_nobody():
    """P5: its samples are tried again alone, so that the one to blame is found; the others are committed."""
    world = World(limits(groups=1, batch=8, micro_batch=16), plan_of(40))
    seen = []

    def bad(worker, keys):
        if worker.stage is Stage.DENOISE and "s20" in keys:
            seen.append(len(keys))
            return "lost", FailureClass.INFRA
        return None

    drive(world, bad)
    assert seen[0] > 1, "it was in no micro-batch"
    assert seen[1:] == [1] * RETRIES.infra
    assert world.quarantined == ["s20"]
    assert len(world.committed) == 39


def test_one_group_that_never_starts_ends_the_run():
    """P6: a stage with no worker left is said so instead of waiting for ever."""
    world = World(limits(groups=2), plan_of(3))
    while not world.abort:
        groups = [w for w in world.starting if w.stage is Stage.DENOISE]
        if groups:
            world.lost(groups[0], FailureClass.INFRA)
        else:
            world.tick(100.0)
    assert "denoise group" in world.abort.failure.message
    assert "lost" in world.abort.failure.message


@pytest.mark.parametrize("sick", [RETRIES.worker - 1, RETRIES.worker])
def test_a_node_that_is_excluded_counts_once(sick):
    """P5, P6: nodes on which nothing starts, each found out by two starts, cost a slot one loss each: after three of
    them in a row the fourth renders. Four in a row are not the nodes' fault, and the run ends.
    """
    world = World(limits(groups=1), plan_of(3))
    for failed_starts in range(2 * sick):
        if not world.abort:
            group = next(worker for worker in world.starting if worker.stage is Stage.DENOISE)
            world.feed(WorkerLost(group, Failure(FailureClass.INFRA, "no device"), counts=failed_starts % 2 == 0))
            world.tick(MAX_BACKOFF_S)
    world.calm_down()
    if sick < RETRIES.worker:
        assert len(world.committed) == 3
    else:
        assert "every denoise group was lost 4 times in a row" in world.abort.failure.message


def drive(world, bad):
    """Run to the end; `bad(worker, keys)` says what goes wrong with a task, as (what, kind), or None."""
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
    pytest.fail("no end")


def test_samples_that_kill_their_group_do_not_use_it_up():
    """P5: a slot counts each sample once, so killers that take turns end in quarantine and the run does not abort."""
    world = World(limits(groups=1), plan_of(8))
    killers = {("s2",), ("s3",)}
    drive(world, lambda w, k: ("lost", FailureClass.INFRA) if w.stage is Stage.DENOISE and k in killers else None)
    assert world.finish
    assert sorted(world.quarantined) == ["s2", "s3"]
    assert len(world.committed) == 6


def test_a_batch_with_a_killer_does_not_use_up_the_encoder():
    """P5: losing the whole batch counts for nobody; the killer is found alone and quarantined."""
    world = World(limits(batch=4), plan_of(8))
    drive(world, lambda w, k: ("lost", FailureClass.INFRA) if w.stage is Stage.ENCODE and "s7" in k else None)
    assert world.finish
    assert world.quarantined == ["s7"]
    assert len(world.committed) == 7


def test_different_samples_that_kill_a_lone_group_end_the_run():
    """P6: a group that loses every sample it is given is sick, and with no other left the run says so."""
    world = World(limits(groups=1), plan_of(20))
    drive(world, lambda w, k: ("lost", FailureClass.INFRA) if w.stage is Stage.DENOISE else None)
    assert world.abort
    assert len(world.quarantined) < RETRIES.worker + 1


def test_a_worker_on_which_everything_fails_is_rebuilt():
    """P5: three different samples that fail in a row on a worker that survives them are a sign against the worker."""
    world = World(limits(groups=1), plan_of(12))
    drive(
        world, lambda w, k: ("failed", FailureClass.POISON) if w.stage is Stage.DECODE and w.incarnation == 0 else None
    )
    assert world.finish
    assert len(world.quarantined) <= 3, "what had both its tries before the worker fell under suspicion"
    assert len(world.committed) >= 9


def test_an_outage_of_the_output_root_blames_nobody():
    """P5: while the store does not answer, decodes wait and are tried again; no sample is charged."""
    world = World(limits(groups=1), plan_of(4))
    drive(
        world, lambda w, k: ("failed", FailureClass.OUTAGE) if w.stage is Stage.DECODE and world.now < 600.0 else None
    )
    assert world.finish
    assert len(world.committed) == 4
    assert world.runs[Stage.DENOISE, "s0"] == 1


def test_what_waits_on_disks_lets_the_groups_go_on():
    """P5, P7: in an outage a video on a disk takes no room of the queues or the object store; all are committed later,
    rendered once, and a worker that cannot start meanwhile holds up no decode.
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


def test_a_worker_that_cannot_start_in_an_outage_holds_up_no_decode():
    """P5: it tries again later, as often as it takes, and who is there fills the disks."""
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
    world.calm_down()
    assert len(world.committed) == 30


def test_two_outages_far_apart_are_two():
    """P5: a worker that starts has seen the output root, and a long denoise between two short outages is no outage."""
    world = World(limits(groups=1), plan_of(1))
    decoder = next(worker for worker in world.starting if worker.stage is Stage.DECODE)
    world.lost(decoder, FailureClass.OUTAGE)
    world.tick(OUTAGE_PAUSE_S)
    while not any(worker.stage is Stage.DENOISE for worker in world.running):
        world.ready(world.starting[0]) if world.starting else world.done(next(iter(world.running)))
    for worker in list(world.starting):
        world.ready(worker)
    world.idle_away(OUTAGE_LIMIT_S + 1, lambda: False)
    world.done(next(iter(world.running)))
    world.failed(next(iter(world.running)), FailureClass.OUTAGE)
    assert not world.abort
    world.calm_down()
    assert world.committed == ["s0"]


@pytest.mark.parametrize(("stage", "denoises"), [(Stage.DECODE, 1), (Stage.ENCODE, 1 + 2 * RETRIES.infra)])
def test_a_lost_spool_costs_a_render_and_charges_nobody(stage, denoises):
    """P4, P5: it goes on from its latents where these are stored, else from the start, however often that happens."""
    world = World(limits(groups=1), plan_of(1))
    for _ in range(2 * RETRIES.infra):
        while not (decodes := [worker for worker in world.running if worker.stage is Stage.DECODE]):
            world.ready(world.starting[0]) if world.starting else world.done(next(iter(world.running)))
        world.spool(decodes[0])
        world.lose_spooled("s0", stage)
        assert world.scheduler.failures("s0") == ()
    world.calm_down()
    assert world.committed == ["s0"]
    assert world.runs[Stage.DENOISE, "s0"] == denoises


def test_the_driver_keeps_account_of_so_many_spooled_videos(monkeypatch):
    """P7: beyond that, decodes wait as they do when the disks are full."""
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
    world.calm_down()
    assert len(world.committed) == 30


def test_a_drain_decodes_to_disk_and_waits_no_longer_than_it_may():
    """P4: in an outage a stop leaves on disks what was denoised; the resume commits it."""
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
    """Design section 6: after half an hour without its output root a run stops, and says why."""
    world = World(limits(groups=1), plan_of(4))
    drive(world, lambda w, k: ("failed", FailureClass.OUTAGE) if w.stage is Stage.DECODE else None)
    assert world.abort.failure.kind is FailureClass.FATAL
    assert 1800 < world.now < 2400


def test_groups_are_placed_before_single_actors():
    """P33: an actor that wants one GPU must not stand where only a whole group fits."""
    world = World(limits(), plan_of(4), has_room=False)
    assert {worker.stage for worker in world.starting} == {Stage.DENOISE}
    world.feed(WorkerPlaced(world.starting[0]))
    assert {worker.stage for worker in world.starting} == set(Stage)


def test_a_node_that_is_not_right_does_not_end_a_proven_run():
    """P5: where the same config has started before, a start that fails for good is that node's fault."""
    world = World(limits(groups=2), plan_of(6))
    for _ in range(3):
        world.ready(world.starting[0])
    second = next(worker for worker in world.starting if worker.stage is Stage.DENOISE)
    world.lost(second, FailureClass.FATAL)
    assert not world.abort
    world.calm_down()
    assert len(world.committed) == 6


def test_fatal_failure_aborts_at_once():
    """Design section 6: FATAL stops the run."""
    world = World(limits(), plan_of(3))
    world.lost(world.starting[0], FailureClass.FATAL)
    assert world.abort
    assert world.abort.failure.kind is FailureClass.FATAL


def test_a_hung_task_is_given_up_and_retried():
    """P4: no beat for the stall time means the worker is killed and its sample tried again."""
    world = World(limits(groups=1), plan_of(1))
    for _ in range(3):
        world.ready(world.starting[0])
    world.done(next(iter(world.running)))
    (group,) = world.running
    world.tick(STALL_S - 1)
    world.feed(Heartbeat(group))
    world.tick(STALL_S - 1)
    assert group in world.running, "a beat restarts the clock"
    world.tick(2)
    assert group not in world.running
    world.calm_down()
    assert world.committed == ["s0"]


def test_a_step_that_is_overdue_is_a_hang():
    """P4: who tells when the next step is due is given up then, and not after the stall time; for one that does not
    tell, or would wait longer than that, the stall time counts.
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
    assert denoising(world), "of another task nothing is known yet"


def work_without_decoding(world):
    """Until nothing moves but the decodes, which do not end."""
    for _ in range(1000):
        able = [worker for worker in world.running if worker.stage is not Stage.DECODE]
        if not (world.starting or able):
            return
        world.ready(world.starting[0]) if world.starting else world.done(able[0])
    pytest.fail("it never stopped")


@pytest.mark.parametrize(("share", "most"), [(math.inf, 5), (2 * MIB, 4), (1, 2)])
def test_a_slow_decoder_stops_the_groups_before_the_store_is_full(share, most):
    """P7: each of two groups makes what its share of the store holds, or one sample, what is being decoded included."""
    stages = limits(groups=2, decoders=1, result_bytes=share) | {
        Stage.DECODE: StageLimits(workers=1, ahead=4, task_timeout_s=STALL_S)
    }
    world = World(stages, [Admitted(f"s{i}", Stage.ENCODE, MIB) for i in range(12)])
    work_without_decoding(world)
    denoised = sum(stage is Stage.DENOISE for stage, _ in world.runs)
    assert denoised == most
    world.calm_down()
    assert len(world.committed) == 12


def test_stored_latents_take_no_room():
    """P4, P7: latents that a decoder will read from the output root keep no group from working."""
    plan = [Admitted(f"stored{i}", Stage.DECODE, MIB) for i in range(2)] + [Admitted("new", Stage.ENCODE, MIB)]
    world = World(limits(groups=1, result_bytes=MIB), plan)
    work_without_decoding(world)
    assert world.runs[Stage.DENOISE, "new"] == 1


def test_an_embedding_that_came_heavier_is_remembered():
    """P7: what the next embeddings will weigh is learnt from those that came."""
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


def test_stale_news_changes_nothing():
    """A late answer of a worker's earlier life is ignored."""
    world = World(limits(groups=1), plan_of(2))
    first = next(w for w in world.starting if w.stage is Stage.DENOISE)
    world.lost(first, FailureClass.INFRA)
    assert first in {WorkerId(first.stage, first.slot, 0)}
    for stale in (WorkerReady(first), TaskDone(first), WorkerLost(first, Failure(FailureClass.FATAL, "late"))):
        world.feed(stale)
    assert not world.abort
    world.calm_down()
    assert len(world.committed) == 2


def test_drain_finishes_what_runs_and_begins_nothing():
    """Exit code 143: after a stop, running denoises are decoded and committed, nothing else is begun."""
    world = World(limits(groups=1), plan_of(8))
    while not any(worker.stage is Stage.DENOISE for worker in world.running):
        world.ready(world.starting[0]) if world.starting else world.done(next(iter(world.running)))
    (sample,) = next(task for worker, task in world.running.items() if worker.stage is Stage.DENOISE)
    world.feed(StopRequested())
    world.calm_down()
    assert world.finish == Finish(drained=True)
    assert world.committed == [sample]


def test_a_stop_asks_every_running_denoise_for_a_checkpoint():
    """P4: once, at once, and nobody else: the denoise may outlast the drain."""
    world = World(limits(groups=2), plan_of(8))
    while sum(worker.stage is Stage.DENOISE for worker in world.running) < 2:
        early = [worker for worker in world.running if worker.stage is Stage.ENCODE]
        world.ready(world.starting[0]) if world.starting else world.done(early[0])
    groups = {worker for worker in world.running if worker.stage is Stage.DENOISE}
    assert not world.checkpoints
    world.feed(StopRequested())
    world.feed(StopRequested())
    assert sorted(world.checkpoints) == sorted(groups)


def test_a_long_drain_asks_again_near_its_end():
    """P4: what a denoise has done since the stop is not lost either, if it will not be through in time."""
    world = World(limits(groups=1), plan_of(8), drain_timeout_s=600.0)
    until_denoising(world, groups=1)
    (group,) = denoising(world)
    world.feed(StopRequested())
    world.idle_away(569.0, lambda: False)
    assert world.checkpoints == [group]
    world.idle_away(30.0, lambda: False)
    assert world.checkpoints == [group, group]
    assert not world.finish


def test_drain_ends_at_its_deadline():
    """A drain waits no longer than drain_timeout_s for a task that does not end."""
    world = World(limits(groups=1), plan_of(8), drain_timeout_s=20.0)
    while not any(worker.stage is Stage.DENOISE for worker in world.running):
        world.ready(world.starting[0]) if world.starting else world.done(next(iter(world.running)))
    world.feed(StopRequested())
    world.tick(19.0)
    assert not world.finish
    world.tick(2.0)
    assert world.finish == Finish(drained=True)


def test_lost_latents_begin_anew():
    """P4: when even the stored latents are gone, the sample is rendered from the start."""
    world = World(limits(groups=1), plan_of(1, Stage.DECODE))
    world.ready(world.starting[0])
    (decoder,) = world.running
    world.running.pop(decoder)
    world.idle.add(decoder)
    world.at["s0"] = Stage.ENCODE
    world.feed(TaskFailed(decoder, Failure(FailureClass.INFRA, "no latents", begin_anew=True)))
    world.calm_down()
    assert world.committed == ["s0"]
    assert world.runs[Stage.DENOISE, "s0"] == 1


def test_encoders_take_whole_batches_while_groups_have_work():
    """Stages: a batch takes hardly longer than one sample, so an encoder waits until a whole one has room; but not
    while a group has nothing to do.
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
