"""Messages of the scheduler: the events that it takes and the actions that it returns.

Messages are frozen and carry sample keys, never payloads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hv_batch.job.failure import Failure
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload


@dataclass(frozen=True, slots=True, order=True)
class WorkerId:
    """One incarnation of the worker in one slot of a stage.

    A rebuilt worker has the next `incarnation`, so that the scheduler recognises events of an earlier one as stale. The
    text form, for example `denoise-0.1`, appears in logs and records.
    """

    stage: Stage
    slot: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.stage.name.lower()}-{self.slot}.{self.incarnation}"


# Events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admitted:
    """The next sample of the plan, and its first stage (DECODE if its final latents are already stored)."""

    key: str
    stage: Stage = Stage.ENCODE
    latent_bytes: int = 0  # expected size of its latents in the object store
    size_class: int = 0  # index of the group size that denoises it
    work: Workload | None = None  # determines how long the sample takes at a stage
    lora: str = ""  # the LoRAs that its denoise merges into the weights (`SamplingParams.lora`)


@dataclass(frozen=True, slots=True)
class PlanExhausted:
    """The plan has no further samples."""


@dataclass(frozen=True, slots=True)
class WorkerPlaced:
    """A starting worker has its resources reserved; it has yet to load."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The worker has loaded and accepts tasks."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker died or failed to start. Its running task is lost."""

    worker: WorkerId
    failure: Failure
    counts: bool = True  # whether the loss counts towards abandoning the slot; False if it excluded a node


@dataclass(frozen=True, slots=True)
class WorkerLeaving:
    """A node of the worker is draining and goes away at `until_s`, on the clock of `step`; inf if the time is unknown.

    The event may be repeated; the latest `until_s` is valid.
    """

    worker: WorkerId
    until_s: float


@dataclass(frozen=True, slots=True)
class TaskDone:
    """The running task of the worker succeeded."""

    worker: WorkerId
    result_bytes: tuple[int, ...] = ()  # size of each sample's result in the object store, if not known in advance


@dataclass(frozen=True, slots=True)
class Spooled:
    """The decode succeeded, but the output root is unreachable: the videos of `keys` wait on the disk of `node` (a Ray
    node id). The videos of the task's other samples are committed.
    """

    worker: WorkerId
    node: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """A video that was spooled to the disk of a node is committed."""

    key: str


@dataclass(frozen=True, slots=True)
class SpoolLost:
    """A spooled video is lost, for example with its node. The sample continues at `stage`; no failure is charged."""

    key: str
    stage: Stage


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """The running task raised an error, and the worker can run the next task."""

    worker: WorkerId
    failure: Failure


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The worker's running task made progress."""

    worker: WorkerId
    next_within_s: float = math.inf  # the next heartbeat is due within this time; inf if the worker cannot predict it


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Drain the run: start no encoding or denoise; running tasks may finish or leave a step checkpoint."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. The scheduler checks for hung tasks and due checkpoints."""


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
    """Send up to `count` `Admitted` events, and `PlanExhausted` if the plan ends before that."""

    count: int


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Request resources for the worker and start it."""

    worker: WorkerId
    size_class: int = 0  # for a denoise group, the index of its size


@dataclass(frozen=True, slots=True)
class KillWorker:
    """Kill the worker because of `failure`. No event is expected in return."""

    worker: WorkerId
    failure: Failure
    rebuild: bool = False  # the slot starts again, and may reuse the reservation of this worker


@dataclass(frozen=True, slots=True)
class ReleaseWorker:
    """Stop an idle or loading worker, or withdraw its pending resource request. The worker has not failed."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class Resized:
    """An `auto` pool changes its number of workers. For the log only: starts and releases are separate actions."""

    stage: Stage
    workers: int
    reason: str  # a complete sentence


@dataclass(frozen=True, slots=True)
class Run:
    """Run the task of `stage` for the samples `keys` on `worker`."""

    worker: WorkerId
    keys: tuple[str, ...]
    stage: Stage


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Make the denoise group `worker` write a step checkpoint after its current step."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The sample has used up its tries: write its quarantine record."""

    key: str
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """The run cannot continue."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Finish:
    """The run ends. `drained` is true if a stop request left samples unfinished."""

    drained: bool


Action = Admit | StartWorker | KillWorker | ReleaseWorker | Resized | Run | Checkpoint | Quarantine | Abort | Finish
