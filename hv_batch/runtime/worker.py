"""The interface between the driver and its workers. A worker is one pool actor or one denoise group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.scheduling.messages import Event, Heartbeat, Spooled, TaskDone, WorkerId, WorkerLost
from hv_batch.job.stages import Stage
from hv_batch.runtime.classify import classify
from hv_batch.runtime.run_context import ProgressReport, PublishReport, StageReport

Watch = Callable[[ray.ObjectRef, Callable[[ray.ObjectRef], list[Event]]], None]


# Runtime environment of an actor without GPUs. Ray leaves all GPUs of the node visible to it, and it must not create a
# CUDA context on a GPU that is reserved for another actor.
HIDE_GPUS = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}


@dataclass(slots=True)
class InFlight:
    """One sample between admission and its record. It holds references and small reports, never a payload."""

    sample: Sample
    embeddings: ray.ObjectRef | None = None
    latents: ray.ObjectRef | None = None  # None also if the decoder must read them from the output root
    stages: dict[str, StageReport] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    earlier: tuple[Failure, ...] = ()  # from before its release from quarantine; they do not count as tries now
    has_steps: bool = False  # the output root may hold a step checkpoint of it
    look: str = ""  # of its video, as `PublishReport.look`
    trace: Any = None  # the context of its first OpenTelemetry span, if there is one

    @property
    def history(self) -> tuple[Failure, ...]:
        return (*self.earlier, *self.failures)

    @property
    def attempt(self) -> int:
        """Number of the current try, from 1."""
        return len(self.history) + 1

    def may_resume(self) -> bool:
        """Whether the next denoise may start from a step checkpoint.

        After a POISON failure it must start from the first step, because the checkpoint may contain the fault.
        """
        return self.has_steps and all(failure.kind is not FailureClass.POISON for failure in self.failures)


class Worker(Protocol):
    nodes: frozenset[str]  # ids of the Ray nodes on which it runs; empty until it is placed

    @property
    def is_ready(self) -> bool:
        """Whether it has loaded."""
        ...

    def run(self, items: Sequence[InFlight], stage: Stage) -> None: ...

    def poll(self, now: float) -> list[Event]:
        """Request a progress report, and end a start that has exceeded its time limit. `now` is a monotonic time."""
        ...

    def kill(self, *, rebuild: bool = False) -> None:
        """End this incarnation. With `rebuild` the slot gets another one, which may reuse the reservation."""
        ...


class HeartbeatPoller:
    """Polls the progress counter of one actor, and turns each change into a `Heartbeat`.

    At most one request is outstanding. `count` is the last value received.
    """

    def __init__(self, worker: WorkerId, actor: Any, watch: Watch) -> None:
        self._worker, self._actor, self._watch = worker, actor, watch
        self._asking = False
        self.count = 0

    def ask(self) -> None:
        if not self._asking:
            self._asking = True
            self._watch(self._actor.progress.remote(), self._answered)

    def _answered(self, ref: ray.ObjectRef) -> list[Event]:
        self._asking = False
        try:
            sign: ProgressReport = ray.get(ref)
        except RayError as error:
            return [WorkerLost(self._worker, classify(error, str(self._worker)))]
        changed, self.count = sign.count != self.count, sign.count
        return [Heartbeat(self._worker, sign.next_within_s)] if changed else []


def start_failure(failure: Failure) -> Failure:
    """The failure of a worker that did not start, as INFRA unless its class already charges no sample.

    No sample caused it, so it must count against the worker's slot.
    """
    if failure.kind in (FailureClass.FATAL, FailureClass.PREEMPTED, FailureClass.OUTAGE):
        return failure
    return replace(failure, kind=FailureClass.INFRA, message=f"the worker did not start: {failure.message}")


def decoded(worker: WorkerId, items: Sequence[InFlight], reports: Sequence[PublishReport]) -> Event:
    """The event for the result of a decode task. `reports` has an entry for each of `items`, which keep the looks."""
    spooled: dict[str, str] = {}
    for item, report in zip(items, reports, strict=True):
        item.look = report.look
        if report.node is not None:
            spooled[item.sample.key] = report.node
    return Spooled(worker, next(iter(spooled.values())), tuple(spooled)) if spooled else TaskDone(worker)
