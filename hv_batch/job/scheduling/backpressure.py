"""How many samples may go where: bounded queues between the stations, and tasks that take no more than has room (P7).

A station begins no task whose results the next one has no room for, nor one whose results the object store has none for
beside what else its worker has made (freight.py). Queues are measured in tasks. One of several quick samples
(parcels.py) has the room of one: they are as little work, and no queue keeps a worker waiting for their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hv_batch.job.scheduling.limits import StageLimits
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.scheduling.micro_batches import Parcels
from hv_batch.job.scheduling.object_store_budget import Freight
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.stages import Stage

if TYPE_CHECKING:
    from hv_batch.job.workload import Work

SPOOLED_AT_MOST = 10_000  # videos on the disks of nodes, of which the driver keeps account


class Flow:
    """Asked before anything begins; told how long tasks took."""

    def __init__(self, limits: Mapping[Stage, StageLimits], queues: Queues, freight: Freight) -> None:
        self._limits = limits
        self._queues = queues
        self._freight = freight
        self._parcels = Parcels()

    @property
    def window(self) -> int:
        """Most samples at the stations: what these hold while every queue is full, of quick ones if any."""
        return sum(self._holds(stage, self._limits[stage].batch) for stage in Stage)

    def measure(self, stage: Stage, work: Sequence[Work | None], seconds: float) -> None:
        """A task took so many seconds for each of its samples."""
        if stage is not Stage.ENCODE:
            self._parcels.measure(stage, work, seconds)

    def admissible(self) -> int:
        """How many samples of the plan may come."""
        most = sum(self._holds(stage, self._task_size(stage)) for stage in Stage)
        encode, denoise = self._limits[Stage.ENCODE], self._limits[Stage.DENOISE]
        early = self._queues.at(Stage.ENCODE) + self._queues.waiting(Stage.DENOISE)
        ahead = encode.ahead + encode.workers * encode.batch + denoise.ahead * self._task_size(Stage.DENOISE)
        return max(0, min(most - len(self._queues), ahead - early))

    def lane_for(self, stage: Stage, own: int) -> int | None:
        """Where an idle worker finds its next samples: to denoise, in its `own` lane, else where any wait longest."""
        lanes = [own] if stage is Stage.DENOISE else self._queues.lanes(stage)
        return self._queues.oldest(stage, (lane for lane in lanes if self._room_for(stage, lane) > 0))

    def task_for(self, worker: WorkerId, stage: Stage, lane: int, workers: int) -> int:
        """How many of a lane's next samples one of `workers` that share them may work on now."""
        return min(self.may_make(worker, stage, lane, workers), self._room_for(stage, lane))

    def may_make(self, worker: WorkerId, stage: Stage, lane: int, workers: int = 1) -> int:
        """As `task_for`, wherever the results go: for what they weigh, and for the time that they take."""
        upcoming = self._queues.upcoming(stage, lane, self._limits[stage].batch)
        if stage is not Stage.ENCODE:
            together = self._parcels.fitting(stage, map(self._queues.work, upcoming))
            fair = -(-self._queues.waiting(stage, lane) // max(1, workers))
            upcoming = upcoming[: min(together, fair)]
        return len(upcoming) if stage is Stage.DECODE else self._freight.room(worker, upcoming)

    def room_behind(self, stage: Stage, lane: int | None = None) -> int:
        """How many more samples the next station could hold if everything running here arrived: for each size of groups
        its own, all of it for decoders. What comes behind these are the disks of the nodes.
        """
        if stage is Stage.DECODE:
            return SPOOLED_AT_MOST - self._queues.aside - self._queues.at(stage) + self._queues.waiting(stage)
        behind, lane = Stage(stage + 1), lane if stage is Stage.ENCODE else None
        coming = self._queues.at(stage, lane) - self._queues.waiting(stage, lane)
        ahead = self._limits[behind].ahead if lane is None else self._limits[behind].sizes[lane].ahead
        return ahead * self._task_size(behind) - self._queues.waiting(behind, lane) - coming

    def _room_for(self, stage: Stage, lane: int) -> int:
        """How many samples a task may begin with now. While groups have work, an encoder waits until a whole batch has
        room: it takes hardly longer than one sample.
        """
        room = self.room_behind(stage, lane)
        can_wait = stage is Stage.ENCODE and self._queues.waiting(Stage.DENOISE, lane) > 0
        return 0 if can_wait and room < self._limits[stage].batch else room

    def _task_size(self, stage: Stage) -> int:
        """How many samples a task of the station takes as things are."""
        limits = self._limits[stage]
        return limits.batch if stage is Stage.ENCODE else min(limits.batch, self._parcels.usual(stage))

    def _holds(self, stage: Stage, task_size: int) -> int:
        """Samples that run at a station and wait there."""
        limits = self._limits[stage]
        ahead = limits.ahead if stage is Stage.ENCODE else limits.ahead * task_size
        return ahead + limits.workers * task_size
