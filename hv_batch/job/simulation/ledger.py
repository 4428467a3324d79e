"""What the GPUs of a simulated cluster did: GPU-seconds of work, and lost ones by cause.

Every GPU-second of every node belongs to exactly one entry, so that the entries add up to the capacity of the cluster.
"""

from __future__ import annotations

from enum import StrEnum

from hv_batch.job.failure import FailureClass
from hv_batch.job.stages import Stage


class Use(StrEnum):
    """What a GPU-second was used for, or why it was lost."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    START_UP = "start_up"  # the start of the run, and workers that load
    PREEMPTION = "preemption"  # work that went away with a node, and free GPUs of draining nodes
    FAILURE = "failure"  # work of tasks that failed or whose worker died
    IDLE_GROUPS = "idle_groups"  # ready groups without a sample, before the tail
    IDLE_POOLS = "idle_pools"  # ready encoders and decoders without a sample, before the tail
    UNUSED = "unused"  # no worker holds the GPU, before the tail
    TAIL = "tail"  # idle or free GPUs after the last sample was admitted, or after the stop request


WORK = {Stage.ENCODE: Use.ENCODE, Stage.DENOISE: Use.DENOISE, Stage.DECODE: Use.DECODE}


def lost_to(failure: FailureClass) -> Use:
    return Use.PREEMPTION if failure is FailureClass.PREEMPTED else Use.FAILURE


class Ledger:
    """GPU-seconds by use."""

    def __init__(self) -> None:
        self.seconds: dict[Use, float] = dict.fromkeys(Use, 0.0)
        self._free_since = 0.0

    def add(self, use: Use, gpus: float, seconds: float) -> None:
        self.seconds[use] += gpus * seconds

    def add_free(self, free: float, draining: float, now: float, use: Use) -> None:
        """Account for the GPUs without a worker since the last call. Call it before their number changes."""
        self.add(use, free, now - self._free_since)
        self.add(Use.PREEMPTION, draining, now - self._free_since)
        self._free_since = now
