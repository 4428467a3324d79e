"""Denoise groups, from the driver's side: a gang that is placed, meets, renders one sample at a time, and goes as one.

Life cycle: placement group -> one actor a rank -> rank 0 opens the meeting point -> all ranks join -> ready. The first
failure of any rank ends the whole gang (the others would hang in a collective), frees its placement group, and leaves
the rebuild to the scheduler (P4, P5). The placement group belongs to this driver, so Ray reclaims it if we are killed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hv_batch.job.errors import Failure, FailureClass
from hv_batch.job.events import Event, TaskDone, TaskFailed, WorkerId, WorkerLost, WorkerPlaced, WorkerReady
from hv_batch.runtime.context import RunContext
from hv_batch.runtime.failures import classify, input_was_lost, most_telling
from hv_batch.runtime.placement import SAY_EVERY_S, group_bundles, show, total
from hv_batch.runtime.ranks import RankActor
from hv_batch.runtime.workers import HIDE_GPUS, InFlight, Pulse, Watch, start_failure

# When a rank fails, its peers' own errors arrive within moments; this is how long they may take to be heard before the
# most telling one is chosen.
COLLATERAL_S = 0.3

# Ray shall not narrow each rank's view to its own GPU: ranks of a node must see each other's (see RankActor.join).
SHOW_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}


class DenoiseGroup:
    """One life of one group."""

    def __init__(self, worker: WorkerId, context: RunContext, watch: Watch, say: Callable[[str], None]) -> None:
        self.id = worker
        self._context = context
        self._say = say
        self._watch = watch
        self._bundles = group_bundles(context.config)
        self._deadline = math.inf  # of the start, once placed: waiting for nodes is not a fault of the group
        self._next_word = time.monotonic() + SAY_EVERY_S
        self._ready = False
        self._killed = False
        self._ranks: list[Any] = []
        self._pulses: list[Pulse] = []
        self._placement: PlacementGroup = placement_group(self._bundles, strategy="STRICT_PACK", name=f"hv-{worker}")
        watch(self._placement.ready(), self._placed)

    def poll(self, now: float) -> list[Event]:
        if self._ready:
            for pulse in self._pulses:
                pulse.ask()
        elif now > self._deadline:
            message = "its ranks did not load and meet within timeouts.start_s"
            return [WorkerLost(self.id, Failure(FailureClass.INFRA, message, where=str(self.id)))]
        elif not self._ranks and now > self._next_word:
            self._next_word = now + SAY_EVERY_S
            self._say(self._why_waiting())
        return []

    def kill(self) -> None:
        self._killed = True
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        remove_placement_group(self._placement)

    # Starting ---------------------------------------------------------------------------------------------------------

    def _placed(self, ref: ray.ObjectRef) -> list[Event]:
        if self._killed:
            return []
        if error := _error_of(ref):
            return [WorkerLost(self.id, start_failure(classify(error, str(self.id))))]
        groups = self._context.config.groups
        actor_class: Any = RankActor  # ray.remote has replaced the class by its actor factory
        for index in range(len(self._bundles)):
            strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
            actor = actor_class.options(
                num_cpus=groups.cpus_per_rank,
                num_gpus=groups.gpus_per_rank,
                scheduling_strategy=strategy,
                runtime_env=SHOW_GPUS if self._context.config.parallel.device == "cuda" else HIDE_GPUS,
            ).remote(self._context, index, str(self.id))
            self._ranks.append(actor)
        self._deadline = time.monotonic() + self._context.config.timeouts.start_s
        # Every rank is asked, so that the death of any is noticed while the group is idle, too.
        self._pulses = [Pulse(self.id, rank, self._watch) for rank in self._ranks]
        first_words = [self._ranks[0].host_rendezvous.remote(), *(rank.seat.remote() for rank in self._ranks)]
        self._when_all(first_words, lambda: self._seated(first_words))
        return [WorkerPlaced(self.id)]

    def _seated(self, first_words: Sequence[ray.ObjectRef]) -> list[Event]:
        address, *seats = ray.get(list(first_words))
        self._when_all([rank.join.remote(address, seats) for rank in self._ranks], self._joined)
        return []

    def _joined(self) -> list[Event]:
        self._ready = True
        return [WorkerReady(self.id)]

    def _when_all(self, refs: Sequence[ray.ObjectRef], then: Callable[[], list[Event]]) -> None:
        """Call `then` once every rank has answered; the first error ends the waiting."""
        missing = set(refs)

        def answered(ref: ray.ObjectRef) -> list[Event]:
            if self._killed or not missing:
                return []
            if _error_of(ref):
                missing.clear()
                return [self._verdict(refs)]
            missing.discard(ref)
            return [] if missing else then()

        for ref in refs:
            self._watch(ref, answered)

    # Rendering --------------------------------------------------------------------------------------------------------

    def run(self, items: Sequence[InFlight]) -> None:
        (item,) = items
        resume = self._ranks[0].read_steps.remote(item.sample) if item.may_resume() else None
        item.has_steps = True
        arguments = (item.sample, item.embeddings, item.stages, resume)
        latents, report = self._ranks[0].denoise.options(num_returns=2).remote(*arguments)
        others = [rank.denoise.remote(*arguments) for rank in self._ranks[1:]]

        def rendered() -> list[Event]:
            item.latents, item.embeddings = latents, None
            item.stages["denoise"] = ray.get(report)
            return [TaskDone(self.id)]

        self._when_all([report, *others], rendered)

    def checkpoint(self) -> None:
        """Let the running denoise write a step checkpoint soon. Nobody waits for the answer: the group may be dying."""
        self._ranks[0].checkpoint.remote()

    def _verdict(self, refs: Sequence[ray.ObjectRef]) -> Event:
        """What a rank's error means for the group, after a moment for the others' errors to arrive."""
        heard, _ = ray.wait(list(refs), num_returns=len(refs), timeout=COLLATERAL_S, fetch_local=False)
        errors = [error for ref in heard if (error := _error_of(ref))]
        failures = [classify(error, str(self.id)) for error in errors]
        failure = most_telling(failures)
        if not self._ready:
            return WorkerLost(self.id, start_failure(failure))
        # Where every rank refused the sample alike (latents that are not finite, an input that was lost), none is left
        # waiting in a collective: the gang keeps its 26 GB of weights and takes the next sample.
        refused = all(f.kind is FailureClass.POISON for f in failures) or all(map(input_was_lost, errors))
        if refused and len(errors) == len(refs):
            return TaskFailed(self.id, failure)
        return WorkerLost(self.id, failure)

    def _why_waiting(self) -> str:
        asked = show(total(self._bundles))
        there = show({k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")})
        return (
            f"{self.id} waits for a node: {len(self._bundles)} rank(s) ask for {asked} on one node; free in the whole "
            f"cluster: {there}"
        )


def _error_of(ref: ray.ObjectRef) -> RayError | None:
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None
