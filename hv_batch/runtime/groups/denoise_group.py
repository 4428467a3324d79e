"""The driver's side of a denoise group: it is placed, its ranks meet, it renders one task at a time, and ends as one.

Life cycle: reservation -> one actor a rank -> rank 0 opens the rendezvous -> all ranks join and check themselves.
The first failure of any rank ends the whole group, because the other ranks would hang in a collective. The scheduler
decides on the rebuild (P4, P5). The reservation is retained for that if its nodes are usable (see `reservation_pool`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
from hv_batch.runtime.groups.rank_actor import DenoiseTask, Joined, RankActor, RankLocation
from hv_batch.runtime.groups.rank_answers import Answers, CallLater, Errors, RankAnswers
from hv_batch.runtime.groups.reservation import GroupReservation
from hv_batch.runtime.groups.reservation_pool import ReservationPool
from hv_batch.runtime.nodes.exclusion import NodeExclusion
from hv_batch.runtime.run_context import RunContext, StageReport
from hv_batch.runtime.worker import HIDE_GPUS, HeartbeatPoller, InFlight, Watch, decoded, start_failure

logger = logging.getLogger(__name__)

# Ray must not narrow each rank's view to its own GPU: ranks of a node must see each other's (see RankActor.join).
SHOW_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}

# In a retained reservation the processes start as soon as those of the last incarnation have ended: the node has
# started them before. A process that hangs in a driver call cannot be killed, and Ray withholds its GPU until it ends.
RESTART_S = 120.0


class DenoiseGroup:
    """One incarnation of a group, whose ranks share a sample by `plan`. No method blocks."""

    def __init__(
        self,
        worker: WorkerId,
        plan: ParallelPlan,
        context: RunContext,
        watch: Watch,
        call_later: CallLater,
        pool: ReservationPool,
        exclusion: NodeExclusion,
    ) -> None:
        self.id = worker
        self.plan = plan
        self.nodes: frozenset[str] = frozenset()
        self.is_ready = False
        self._context = context
        self._watch = watch
        self._call_later = call_later
        self._pool = pool
        self._exclusion = exclusion
        self._deadline = math.inf  # of the start, once placed: a wait for nodes is not a failure of the group
        self._killed = False
        self._all_started = False  # all ranks have
        self._awaited: RankAnswers | None = None  # of the call that is under way, or of the last one
        self._nodes: list[str] = []
        self._ranks: list[Any] = []
        self._heartbeats: list[HeartbeatPoller] = []
        self._reservation: GroupReservation | None = None  # None while the pool probes the nodes of one
        self._reserve()

    def poll(self, now: float) -> list[Event]:
        if self._is_failing():  # the ranks' errors are about to end it, and are more precise than a timeout
            return []
        if self.is_ready:
            for heartbeat in self._heartbeats:
                heartbeat.ask()
        elif self._reservation is None:
            return []
        elif not self._ranks:
            self._pool.waits(self.id, self._reservation, now)
            if not self._pool.is_worth_waiting_for(self._reservation):
                self._reservation.release()
                self._reserve()
        elif not self._reservation.is_intact():
            # Ray would go on waiting for actors that were to start on a node that is gone.
            return [self._lost_at_start("a node of it went while it started")]
        elif now > self._deadline:
            why = "a group did not load and meet in time"
            counts = not self._exclusion.start_failed(Stage.DENOISE, self._nodes, why)
            return [self._lost_at_start(self._why_late(), counts)]
        return []

    def kill(self, *, rebuild: bool = False) -> None:
        self._killed = True
        if self._awaited:
            self._awaited.cancel()
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        self._pool.ended(self.id)
        if self._reservation is None:
            return
        self._pool.mark_free(self._reservation)
        if rebuild and self._all_started:  # otherwise something unknown may hold its resources
            self._pool.retain(self._reservation)
        else:
            self._reservation.release()

    # Starting ---------------------------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        self._reservation = None
        self._pool.request(self.id, self.plan, self._granted)

    def _granted(self, reservation: GroupReservation) -> None:
        if self._killed:
            reservation.release()
            return
        self._reservation = reservation
        self._watch(reservation.ready(), lambda ref: self._placed(ref, reservation))

    def _placed(self, ref: ray.ObjectRef, reservation: GroupReservation) -> list[Event]:
        if self._killed or reservation is not self._reservation:
            return []
        if error := _error_of(ref):
            return [WorkerLost(self.id, start_failure(classify(error, str(self.id))))]
        config = self._context.config
        self._nodes = reservation.note_placed()
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
        start_s = min(RESTART_S, config.timeouts.start_s) if reservation.was_occupied else config.timeouts.start_s
        self._deadline = time.monotonic() + start_s
        # Every rank is asked, so that the death of any is noticed while the group is idle, too.
        self._heartbeats = [HeartbeatPoller(self.id, rank, self._watch_heartbeat) for rank in self._ranks]
        self._pool.placed(self.id)
        address, locations = self._ranks[0].host_rendezvous.remote(), self._ask_all("location")
        recorded = {self._ranks[0].recorded_choices.remote(): 0} if self._context.open_options else {}
        self._when_all(
            {address: 0, **locations, **recorded},
            lambda answers: self._meet(
                address,
                [answers[ref] for ref in locations],
                reservation,
                next((answers[ref] for ref in recorded), {}),
            ),
        )
        return [WorkerPlaced(self.id)]

    def _meet(
        self,
        address: ray.ObjectRef,
        locations: Sequence[RankLocation],
        reservation: GroupReservation,
        choices: Mapping[str, str],
    ) -> list[Event]:
        self._all_started = True
        self._pool.mark_occupied(reservation)
        self._deadline = time.monotonic() + self._context.config.timeouts.start_s
        self._when_all(self._ask_all("join", address, locations, choices), partial(self._joined, choices))
        return []

    def _joined(self, before: Mapping[str, str], answers: Mapping[ray.ObjectRef, Joined]) -> list[Event]:
        """All ranks have joined; `before` are the choices that were recorded when they began."""
        for warning in filter(None, (joined.warning for joined in answers.values())):
            logger.warning(warning, extra={"worker": str(self.id)})
        recorded = next((joined.choices for joined in answers.values() if joined.choices), before)
        if recorded == before:
            return self._ready()
        # Another group may have been faster, so that its choices are recorded, which these ranks take over.
        logger.info(f"this run uses {', '.join(f'{option} {value}' for option, value in recorded.items())}")
        self._when_all(self._ask_all("use_choices", recorded), lambda _: self._ready())
        return []

    def _ready(self) -> list[Event]:
        self.is_ready = True
        self._exclusion.started(Stage.DENOISE, self._nodes)
        return [WorkerReady(self.id)]

    def _watch_heartbeat(self, ref: ray.ObjectRef, then: Callable[[ray.ObjectRef], list[Event]]) -> None:
        def answered(ref: ray.ObjectRef) -> list[Event]:
            # That a rank has died is among the errors that are being collected.
            return [event for event in then(ref) if not (self._is_failing() and isinstance(event, WorkerLost))]

        self._watch(ref, answered)

    def _ask_all(self, method: str, *arguments: Any) -> dict[ray.ObjectRef, int]:
        """Call a method of every rank; the references of the answers, each with its rank, in order."""
        return {getattr(actor, method).remote(*arguments): rank for rank, actor in enumerate(self._ranks)}

    def _when_all(
        self,
        asked: Mapping[ray.ObjectRef, int],
        then: Callable[[Answers], list[Event]],
        on_errors: Callable[[Errors], Event] | None = None,
    ) -> None:
        """Call `then` with the answers once every rank has given its own, or `on_errors` if one raises.

        The default of `on_errors` is `_of_errors`. The group makes one such call at a time.
        """

        def fail(errors: Errors) -> list[Event]:
            return [on_errors(errors) if on_errors else self._of_errors(errors, asked)]

        self._awaited = RankAnswers(asked, then, fail, self._watch, self._call_later)

    def _is_failing(self) -> bool:
        return self._awaited is not None and self._awaited.is_failing

    def _lost_at_start(self, message: str, counts: bool = True) -> WorkerLost:
        return WorkerLost(self.id, Failure(FailureClass.INFRA, message, where=str(self.id)), counts)

    def _why_late(self) -> str:
        if self._all_started:
            return "its ranks did not load and meet within timeouts.start_s"
        return (
            "its ranks did not start in time where they are to; a process of an earlier incarnation may hold the GPUs"
        )

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
            item.embeddings = None  # the ranks' tasks hold them; another try encodes again
        arguments = (tasks, *embeddings, *resumes)
        *latents, reports = first.denoise.options(num_returns=len(items) + 1).remote(*arguments)
        others = {actor.denoise.remote(*arguments): rank for rank, actor in enumerate(self._ranks[1:], start=1)}

        def rendered(answers: Answers) -> list[Event]:
            for item, own, report in zip(items, latents, answers[reports], strict=True):
                item.latents = own
                item.stages["denoise"] = report
            self._exclusion.worked(Stage.DENOISE, self._nodes)
            return [TaskDone(self.id)]

        self._when_all({reports: 0, **others}, rendered)

    def _decode(self, item: InFlight) -> None:
        """Rank 0 looks up what there is to decode, all ranks decode, and when all have, rank 0 publishes.

        Before and after, only rank 0 is asked. An error there (an output root that does not answer, frames that are not
        finite) therefore costs the sample a try and the group nothing, unless its node lacks something repeatedly.
        """
        given, item.latents = item.latents, None  # set again if they are known to have outlived a failure
        first, sample = self._ranks[0], item.sample

        def failed_alone(errors: Errors) -> Event:
            (error,) = errors.values()
            failure = classify(error, str(self.id))
            if is_node_fault(error):
                self._exclusion.tool_failed(Stage.DENOISE, self._nodes_of([0]), failure.message)
            is_usable = self._reservation is not None and self._pool.is_usable(self._reservation)
            if not worker_survives(error) or not is_usable:
                return WorkerLost(self.id, failure)
            item.latents = given
            return TaskFailed(self.id, failure)

        def decode(answers: Answers) -> list[Event]:
            upstream = answers[reports]
            if upstream is None:  # it is committed
                return [TaskDone(self.id)]
            decoding = self._ask_all("decode", sample, given or stored)
            self._when_all(
                decoding, lambda _: publish(upstream), lambda errors: self._of_errors(errors, decoding, in_step=False)
            )
            return []

        def publish(upstream: Mapping[str, StageReport]) -> list[Event]:
            ref = first.publish.remote(sample, upstream, item.history)
            self._when_all({ref: 0}, lambda answers: [decoded(self.id, [item], [answers[ref]])], failed_alone)
            return []

        stored, reports = first.find_latents.options(num_returns=2).remote(sample, item.stages if given else None)
        self._when_all({reports: 0}, decode, failed_alone)

    def checkpoint(self) -> None:
        """Let the running denoise write a step checkpoint soon. No answer is awaited: the group may be dying."""
        self._ranks[0].checkpoint.remote()

    def _of_errors(self, errors: Errors, asked: Mapping[ray.ObjectRef, int], *, in_step: bool = True) -> Event:
        """What the errors of ranks mean for the group.

        `in_step` is false for a decode, whose ranks do not run the same collectives: if all have failed, messages that
        no rank has received may be left between them.
        """
        # If a node dies with a rank and with the input of another one, the rank is what the group has lost.
        telling = [error for error in errors.values() if not input_was_lost(error)] or list(errors.values())
        failures = [classify(error, str(self.id)) for error in telling]
        failure = most_telling(failures)
        if not self.is_ready:
            own = [asked[ref] for ref, error in errors.items() if not is_collateral(error)]
            return self._start_failed(failure, own or range(len(self._ranks)))
        counts = True
        if faulty := [asked[ref] for ref, error in errors.items() if is_device_fault(error)]:
            counts = not self._exclusion.device_faulted(Stage.DENOISE, self._nodes_of(faulty), failure.message)
        # If every rank refused the sample alike (latents that are not finite, an input that was lost), no rank waits in
        # a collective: the group keeps its 26 GB of weights and takes the next sample.
        refused = in_step and all(f.kind is FailureClass.POISON for f in failures) and len(telling) == len(errors)
        if (refused or all(map(input_was_lost, errors.values()))) and len(errors) == len(asked):
            return TaskFailed(self.id, failure)
        return WorkerLost(self.id, failure, counts)

    def _start_failed(self, failure: Failure, ranks: Iterable[int]) -> WorkerLost:
        """A start that failed because of these ranks; their nodes are charged, except for a preemption or an outage."""
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
