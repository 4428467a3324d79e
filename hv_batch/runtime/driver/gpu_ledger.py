"""Adds up the GPU time that the workers of a run reserve, by what they do with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from hv_batch.job.stages import STAGES, Stage

START_UP = "start_up"  # placed workers that load their weights
IDLE_GROUPS, IDLE_POOLS = "idle_groups", "idle_pools"  # ready workers without a task
USES = (*(stage.name.lower() for stage in STAGES), START_UP, IDLE_GROUPS, IDLE_POOLS)


def use_of(stage: Stage, *, is_ready: bool, task: Stage | None) -> str:
    """The use of a worker of `stage` that has its GPUs. `task` is the stage of its task; groups may decode."""
    if not is_ready:
        return START_UP
    if task is None:
        return IDLE_GROUPS if stage is Stage.DENOISE else IDLE_POOLS
    return task.name.lower()


class GpuLedger:
    """The names of the uses are those of `hv-batch simulate`. `seconds` are GPU-seconds."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._now: float | None = None

    def note(self, uses: Iterable[tuple[str, float]], now: float) -> Mapping[str, float]:
        """Charge the time since the last call to `uses`: the use and the GPUs of each worker that is placed.

        To be called about once a second. `now` is a monotonic time. Returns what is added.
        """
        elapsed = 0.0 if self._now is None else now - self._now
        self._now = now
        added: defaultdict[str, float] = defaultdict(float)
        for use, gpus in uses:
            added[use] += gpus * elapsed
            self.seconds[use] += gpus * elapsed
        return added
