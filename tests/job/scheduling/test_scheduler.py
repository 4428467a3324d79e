"""hv_batch.job.scheduling.scheduler: its invariants hold under any history of events."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.limits import OUTAGE_LIMIT_S, OUTAGE_PAUSE_S
from hv_batch.job.scheduling.messages import (
    Admitted,
    Finish,
    StopRequested,
    TaskDone,
    TaskFailed,
    WorkerId,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from hv_batch.job.scheduling.workers.worker_slots import MAX_BACKOFF_S
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload
from tests.support.scheduler_world import (
    CHARGED_KINDS,
    MIB,
    STALL_S,
    World,
    denoising,
    limits,
    plan_of,
    until_denoising,
)


@settings(max_examples=100, deadline=None)
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


def test_groups_are_placed_before_single_actors():
    """P33: an actor with one GPU must not block a node that a whole group needs."""
    world = World(limits(), plan_of(4), has_room=False)
    assert {worker.stage for worker in world.starting} == {Stage.DENOISE}
    world.feed(WorkerPlaced(world.starting[0]))
    assert {worker.stage for worker in world.starting} == set(Stage)


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
