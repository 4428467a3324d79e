"""What every worker of the driver has: one actor or group behind one interface."""

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
from hv_batch.runtime.run_context import ProgressReport, StageReport

Watch = Callable[[ray.ObjectRef, Callable[[ray.ObjectRef], list[Event]]], None]


# A CPU-only actor must not open a context on a GPU that belongs to somebody else; Ray leaves it all of them in sight.
HIDE_GPUS = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}


@dataclass(slots=True)
class InFlight:
    """One sample on its way: references and small reports, never a payload."""

    sample: Sample
    embeddings: ray.ObjectRef | None = None
    latents: ray.ObjectRef | None = None  # None also where the decoder shall read them from the output root
    stages: dict[str, StageReport] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    earlier: tuple[Failure, ...] = ()  # of before it was taken back: they cost it no try now
    has_steps: bool = False  # there may be a step checkpoint of it in the output root

    @property
    def history(self) -> tuple[Failure, ...]:
        return (*self.earlier, *self.failures)

    @property
    def attempt(self) -> int:
        """Number of the current try, from 1."""
        return len(self.history) + 1

    def may_resume(self) -> bool:
        """Whether to look for a step checkpoint.

        Once an engine has refused its own result, what led to it is not trusted: the next try is one from the start.
        """
        return self.has_steps and all(failure.kind is not FailureClass.POISON for failure in self.failures)


class Worker(Protocol):
    nodes: frozenset[str]  # Ray's ids of those it stands on; none until it is placed

    def run(self, items: Sequence[InFlight], stage: Stage) -> None: ...

    def poll(self, now: float) -> list[Event]:
        """Ask for progress; also the moment to give up a start that takes too long."""
        ...

    def kill(self, *, rebuild: bool = False) -> None:
        """End this life. With `rebuild` the slot will have another, which may want what this one stood on."""
        ...


class HeartbeatPoller:
    """Asks one actor for its progress counter, at most one question at a time, and turns changes into beats."""

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
    """No sample is to blame for a worker that does not start, so what is somebody's fault counts against the slot."""
    if failure.kind in (FailureClass.FATAL, FailureClass.PREEMPTED, FailureClass.OUTAGE):
        return failure
    return replace(failure, kind=FailureClass.INFRA, message=f"it did not start: {failure.message}")


def decoded(worker: WorkerId, items: Sequence[InFlight], nodes: Sequence[str | None]) -> Event:
    """What the answer to a decode means: each is committed, or waits on the disk of its one of `nodes`."""
    spooled = {item.sample.key: node for item, node in zip(items, nodes, strict=True) if node is not None}
    return Spooled(worker, next(iter(spooled.values())), tuple(spooled)) if spooled else TaskDone(worker)
