"""What the scheduler hears (events) and what it orders (actions): frozen messages that carry keys, never payloads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hv_batch.job.failure import Failure
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload


@dataclass(frozen=True, slots=True, order=True)
class WorkerId:
    """One incarnation of one worker. A rebuilt worker has the next `incarnation`, so stale events are recognised."""

    stage: Stage
    slot: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.stage.name.lower()}-{self.slot}.{self.incarnation}"


# Events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admitted:
    """The plan's next sample, and the stage at which it begins (DECODE when its final latents are already stored)."""

    key: str
    stage: Stage = Stage.ENCODE
    latent_bytes: int = 0  # that its latents will take in the object store
    size_class: int = 0  # the size of the groups that denoise it
    work: Workload | None = None  # what the time that it takes at a stage depends on


@dataclass(frozen=True, slots=True)
class PlanExhausted:
    """There are no further samples."""


@dataclass(frozen=True, slots=True)
class WorkerPlaced:
    """The resources of a starting worker are its own now; it still has to load."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class WorkerReady:
    worker: WorkerId


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker died, failed to start, or was given up; whatever it was doing is lost."""

    worker: WorkerId
    failure: Failure
    counts: bool = True  # towards giving the slot up; False if the node was excluded for this loss


@dataclass(frozen=True, slots=True)
class WorkerLeaving:
    """A node that the worker stands on is to be taken away at `until_s`, on the clock of `step`; inf: some day.

    May be repeated; what is told later is believed.
    """

    worker: WorkerId
    until_s: float


@dataclass(frozen=True, slots=True)
class TaskDone:
    worker: WorkerId
    result_bytes: tuple[int, ...] = ()  # of each sample's result in the object store, where that is not known before


@dataclass(frozen=True, slots=True)
class Spooled:
    """The decode is done, but the output root did not answer: the videos of `keys` wait on the disk of `node` (Ray's
    id). Those of the task's other samples are committed.
    """

    worker: WorkerId
    node: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """A video that waited on the disk of a node is committed."""

    key: str


@dataclass(frozen=True, slots=True)
class SpoolLost:
    """Such a video is gone, as with its node. The sample goes on from `stage`, and nobody is charged."""

    key: str
    stage: Stage


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """The task raised but the worker is fit for the next one."""

    worker: WorkerId
    failure: Failure


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The worker's running task made progress."""

    worker: WorkerId
    next_within_s: float = math.inf  # the next heartbeat comes within this time, if the worker can predict it


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Drain: begin nothing long, let what is running finish or leave a step checkpoint."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Admitted
    | PlanExhausted
    | WorkerPlaced
    | WorkerReady
    | WorkerLost
    | WorkerLeaving
    | TaskDone
    | Spooled
    | Published
    | SpoolLost
    | TaskFailed
    | Heartbeat
    | StopRequested
    | Tick
)

# Actions --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admit:
    """Feed up to `count` `Admitted` events, and `PlanExhausted` when the plan ends before that."""

    count: int


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker: WorkerId
    size_class: int = 0  # of a group, its size


@dataclass(frozen=True, slots=True)
class KillWorker:
    """Tear the worker down, for this reason; no answer is expected."""

    worker: WorkerId
    failure: Failure
    rebuild: bool = False  # the stage wants another in its place, and where it stood is fit for that


@dataclass(frozen=True, slots=True)
class ReleaseWorker:
    """End a worker that does nothing, or withdraw one that still waits for room: nothing is wrong with it."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class Resized:
    """An `auto` pool is to have another number of workers. For people: starts and releases follow by themselves."""

    stage: Stage
    workers: int
    reason: str  # the whole sentence


@dataclass(frozen=True, slots=True)
class Run:
    """Give the task of `stage` for `keys` to `worker`."""

    worker: WorkerId
    keys: tuple[str, ...]
    stage: Stage


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Let the denoise group `worker` write a step checkpoint after the step that it is in."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Quarantine:
    key: str
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """The run cannot go on."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing is left to do; `drained` when a stop cut the run short."""

    drained: bool


Action = Admit | StartWorker | KillWorker | ReleaseWorker | Resized | Run | Checkpoint | Quarantine | Abort | Finish
