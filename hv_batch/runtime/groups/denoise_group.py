"""Denoise groups, from the driver's side: a group that is placed, meets, renders one sample at a time, and goes as one.

Life cycle: seats -> one actor a rank -> rank 0 opens the meeting point -> all ranks join and prove themselves -> ready.
The first failure of any rank ends the whole group (the others would hang in a collective) and leaves the rebuild to the
scheduler (P4, P5). Its seats are kept for that while their nodes are fit; see `reservation_pool`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.messages import (
    Event,
    TaskDone,
    TaskFailed,
    WorkerId,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan
from hv_batch.runtime.classify import (
    classify,
    input_was_lost,
    is_collateral,
    is_device_fault,
    is_node_fault,
    most_telling,
    worker_survives,
)
from hv_batch.runtime.groups.rank_actor import DenoiseTask, RankActor, RankLocation
from hv_batch.runtime.groups.reservation import GroupReservation
from hv_batch.runtime.groups.reservation_pool import ReservationPool
from hv_batch.runtime.nodes.exclusion import NodeExclusion
from hv_batch.runtime.nodes.resources import alive_nodes
from hv_batch.runtime.run_context import RunContext, StageReport
from hv_batch.runtime.worker import HIDE_GPUS, HeartbeatPoller, InFlight, Watch, decoded, start_failure

# When a rank fails, its peers' own errors arrive within moments; this is how long they may take to be heard before the
# most telling one is chosen.
COLLATERAL_S = 0.3

# Ray shall not narrow each rank's view to its own GPU: ranks of a node must see each other's (see RankActor.join).
SHOW_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}

# In seats that are kept, the processes start at once when those of the last life are gone: the node has started them
# before. One that hangs in a driver call cannot be killed, and Ray holds back its GPU as long.
VACATE_S = 120.0


class DenoiseGroup:
    """One life of one group, whose ranks share a sample by `plan`."""

    def __init__(
        self,
        worker: WorkerId,
        plan: ParallelPlan,
        context: RunContext,
        watch: Watch,
        pool: ReservationPool,
        exclusion: NodeExclusion,
    ) -> None:
        self.id = worker
        self.plan = plan
        self.nodes: frozenset[str] = frozenset()
        self._context = context
        self._watch = watch
        self._pool = pool
        self._exclusion = exclusion
        self._deadline = math.inf  # of the start, once placed: waiting for nodes is not a fault of the group
        self._ready = False
        self._killed = False
        self._seated = False
        self._nodes: list[str] = []
        self._ranks: list[Any] = []
        self._pulses: list[HeartbeatPoller] = []
        self._reserve()

    def poll(self, now: float) -> list[Event]:
        if self._ready:
            for pulse in self._pulses:
                pulse.ask()
        elif not self._ranks:
            self._pool.waits(self.id, self._reservation, now)
            if not self._pool.worth_keeping(self._reservation):
                self._reservation.release()
                self._reserve()
        elif not self._reservation.sound(alive_nodes()):
            # Actors that were to start on a node that is gone would be waited for until the deadline.
            return [self._lost_at_start("a node of it went while it started")]
        elif now > self._deadline:
            why = "a group did not load and meet in time"
            counts = not self._exclusion.start_failed(Stage.DENOISE, self._nodes, why)
            return [self._lost_at_start(self._why_late(), counts)]
        return []

    def kill(self, *, rebuild: bool = False) -> None:
        self._killed = True
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        self._pool.ended(self.id)
        self._pool.vacate(self._reservation)
        if rebuild and self._seated:  # else who knows what holds them
            self._pool.keep(self._reservation)
        else:
            self._reservation.release()

    # Starting ---------------------------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        self._reservation = reservation = self._pool.reservation(self.id, self.plan)
        self._watch(reservation.ready(), lambda ref: self._placed(ref, reservation))

    def _placed(self, ref: ray.ObjectRef, reservation: GroupReservation) -> list[Event]:
        if self._killed or reservation is not self._reservation:
            return []
        if error := _error_of(ref):
            return [WorkerLost(self.id, start_failure(classify(error, str(self.id))))]
        config = self._context.config
        self._nodes = reservation.nodes()
        self.nodes = frozenset(self._nodes)
        actor_class: Any = RankActor  # ray.remote has replaced the class by its actor factory
        for rank in range(self.plan.world_size):
            actor = actor_class.options(
                num_cpus=config.groups.cpus_per_rank,
                num_gpus=self._context.run.rank_gpus,
                scheduling_strategy=reservation.strategy(rank),
                runtime_env=SHOW_GPUS if config.parallel.device == "cuda" else HIDE_GPUS,
            ).remote(self._context, self.plan, rank, str(self.id))
            self._ranks.append(actor)
        patience_s = min(VACATE_S, config.timeouts.start_s) if reservation.used else config.timeouts.start_s
        self._deadline = time.monotonic() + patience_s
        # Every rank is asked, so that the death of any is noticed while the group is idle, too.
        self._pulses = [HeartbeatPoller(self.id, rank, self._watch) for rank in self._ranks]
        self._pool.placed(self.id)
        address, seated = self._ranks[0].host_rendezvous.remote(), self._ask_all("location")
        self._when_all({address: 0, **seated}, lambda told: self._meet(address, [told[ref] for ref in seated]))
        return [WorkerPlaced(self.id)]

    def _meet(self, address: ray.ObjectRef, reservation: Sequence[RankLocation]) -> list[Event]:
        self._seated = True
        self._pool.occupy(self._reservation)
        self._deadline = time.monotonic() + self._context.config.timeouts.start_s
        self._when_all(self._ask_all("join", address, reservation), lambda _: self._joined())
        return []

    def _joined(self) -> list[Event]:
        self._ready = True
        self._exclusion.started(Stage.DENOISE, self._nodes)
        return [WorkerReady(self.id)]

    def _ask_all(self, method: str, *arguments: Any) -> dict[ray.ObjectRef, int]:
        """Call a method of every rank; the answers, each with its rank, in order."""
        return {getattr(actor, method).remote(*arguments): rank for rank, actor in enumerate(self._ranks)}

    def _when_all(
        self,
        asked: Mapping[ray.ObjectRef, int],
        then: Callable[[Mapping[ray.ObjectRef, Any]], list[Event]],
        judge: Callable[[ray.ObjectRef], Event] | None = None,
    ) -> None:
        """Call `then` with the answers once every rank has given its own; the first error ends that, and `judge` says
        what it means.
        """
        missing, answers = set(asked), dict[ray.ObjectRef, Any]()

        def answered(ref: ray.ObjectRef) -> list[Event]:
            if self._killed or not missing:
                return []
            try:
                answers[ref] = ray.get(ref)
            except RayError:
                missing.clear()
                return [judge(ref) if judge else self._verdict(asked)]
            missing.discard(ref)
            return [] if missing else then(answers)

        for ref in asked:
            self._watch(ref, answered)

    def _lost_at_start(self, message: str, counts: bool = True) -> WorkerLost:
        return WorkerLost(self.id, Failure(FailureClass.INFRA, message, where=str(self.id)), counts)

    def _why_late(self) -> str:
        if self._seated:
            return "its ranks did not load and meet within timeouts.start_s"
        return "its ranks did not start in time where their seats are; a process of an earlier life may hold the GPUs"

    # Rendering --------------------------------------------------------------------------------------------------------

    def run(self, items: Sequence[InFlight], stage: Stage) -> None:
        if stage is Stage.DECODE:
            (item,) = items
            self._decode(item)
        else:
            self._denoise(items)

    def _denoise(self, items: Sequence[InFlight]) -> None:
        first = self._ranks[0]
        tasks = [DenoiseTask(item.sample, item.stages, item.attempt) for item in items]
        embeddings = [item.embeddings for item in items]
        resumes = [first.read_steps.remote(item.sample) if item.may_resume() else None for item in items]
        for item in items:
            item.has_steps = True
            item.embeddings = None  # the ranks' tasks hold them; another try would encode anew
        arguments = (tasks, *embeddings, *resumes)
        *latents, reports = first.denoise.options(num_returns=len(items) + 1).remote(*arguments)
        others = {actor.denoise.remote(*arguments): rank for rank, actor in enumerate(self._ranks[1:], start=1)}

        def rendered(answers: Mapping[ray.ObjectRef, Any]) -> list[Event]:
            for item, own, report in zip(items, latents, answers[reports], strict=True):
                item.latents = own
                item.stages["denoise"] = report
            self._exclusion.worked(Stage.DENOISE, self._nodes)
            return [TaskDone(self.id)]

        self._when_all({reports: 0, **others}, rendered)

    def _decode(self, item: InFlight) -> None:
        """Rank 0 looks what there is to decode, all ranks decode, and when all have, rank 0 publishes.

        Before and after, only rank 0 is asked, so what it meets there (an output root that is away, frames that are
        not finite) costs the sample a try and the group nothing; unless its node lacks something again and again.
        """
        given, item.latents = item.latents, None  # unless it is known to have outlived a failure
        first, sample = self._ranks[0], item.sample

        def alone(ref: ray.ObjectRef) -> Event:
            error = _error_of(ref)
            assert error
            failure = classify(error, str(self.id))
            if is_node_fault(error):
                self._exclusion.device_faulted(Stage.DENOISE, self._nodes_of([0]), failure.message)
            if not worker_survives(error) or not self._pool.good(self._reservation):
                return WorkerLost(self.id, failure)
            item.latents = given
            return TaskFailed(self.id, failure)

        def found(answers: Mapping[ray.ObjectRef, Any]) -> list[Event]:
            stages = answers[told]
            if stages is None:
                return [TaskDone(self.id)]
            decoding = self._ask_all("decode", sample, given or stored)
            self._when_all(decoding, lambda _: publish(stages), lambda _: self._verdict(decoding, in_step=False))
            return []

        def publish(stages: Mapping[str, StageReport]) -> list[Event]:
            ref = first.publish.remote(sample, stages, item.history)
            self._when_all({ref: 0}, lambda answers: [decoded(self.id, [item], [answers[ref]])], alone)
            return []

        stored, told = first.find_latents.options(num_returns=2).remote(sample, item.stages if given else None)
        self._when_all({told: 0}, found, alone)

    def checkpoint(self) -> None:
        """Let the running denoise write a step checkpoint soon. Nobody waits for the answer: the group may be dying."""
        self._ranks[0].checkpoint.remote()

    def _verdict(self, asked: Mapping[ray.ObjectRef, int], *, in_step: bool = True) -> Event:
        """What a rank's error means for the group, after a moment for the others' errors to arrive.

        Out of step, as in a decode, ranks that have all failed may still have sent each other what nobody has taken.
        """
        heard, _ = ray.wait(list(asked), num_returns=len(asked), timeout=COLLATERAL_S, fetch_local=False)
        errors = {ref: error for ref in heard if (error := _error_of(ref))}
        failures = [classify(error, str(self.id)) for error in errors.values()]
        failure = most_telling(failures)
        if not self._ready:
            own = [asked[ref] for ref, error in errors.items() if not is_collateral(error)]
            return self._start_failed(failure, own or range(len(self._ranks)))
        counts = True
        if faulty := [asked[ref] for ref, error in errors.items() if is_device_fault(error)]:
            counts = not self._exclusion.device_faulted(Stage.DENOISE, self._nodes_of(faulty), failure.message)
        # Where every rank refused the sample alike (latents that are not finite, an input that was lost), none is left
        # waiting in a collective: the group keeps its 26 GB of weights and takes the next sample.
        refused = in_step and all(f.kind is FailureClass.POISON for f in failures)
        if (refused or all(map(input_was_lost, errors.values()))) and len(errors) == len(asked):
            return TaskFailed(self.id, failure)
        return WorkerLost(self.id, failure, counts)

    def _start_failed(self, failure: Failure, ranks: Iterable[int]) -> WorkerLost:
        """Because of these ranks; no node is to blame for its end, or for an output root that is away."""
        counts = True
        if failure.kind not in (FailureClass.PREEMPTED, FailureClass.OUTAGE):
            counts = not self._exclusion.start_failed(Stage.DENOISE, self._nodes_of(ranks), failure.message)
        return WorkerLost(self.id, start_failure(failure), counts)

    def _nodes_of(self, ranks: Iterable[int]) -> set[str]:
        each = self._context.run.ranks_per_node(self.plan)
        return {self._nodes[rank // each] for rank in ranks}


def _error_of(ref: ray.ObjectRef) -> RayError | None:
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None
