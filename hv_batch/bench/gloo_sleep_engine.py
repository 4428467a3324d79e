"""A sleeping engine whose ranks form a gloo process group, synchronize at every step and record timed events.

Each process appends its events to a file of its own, one line per event, so that the events of a killed rank are kept.
The benchmark reads the files; all processes must run on one machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from hv_batch.bench.sleep_engine import SleepDenoiser, SleepEngine
from hv_batch.engine.parallel.process_group import host_store, join_group
from hv_batch.protocol import OnStep, RankSpec, StepState
from hv_batch.sampling_params import SamplingParams

if TYPE_CHECKING:
    from hv_batch.protocol import Engine

JOINING = "joining"  # the processes of all ranks have started
JOINED = "joined"  # the rank has joined the group and passed the self-check
BEGUN = "begun"  # a denoise begins at step 0
RESUMED = "resumed"  # a denoise begins at a step checkpoint
STEP = "step"  # a step is done
ENDED = "ended"  # a denoise is done


@dataclass(frozen=True, slots=True)
class TimedEvent:
    at: float  # seconds of time.monotonic, which is the same in all processes of a Linux machine
    what: str  # one of the constants above
    rank: int
    pid: int


def record_event(folder: str, what: str, rank: int) -> None:
    pid = os.getpid()
    with (Path(folder) / f"{pid}.jsonl").open("a") as file:
        file.write(json.dumps([time.monotonic(), what, rank, pid]) + "\n")


def read_events(folder: str) -> list[TimedEvent]:
    """Return the events of all processes, ordered by time."""
    lines = (line for path in Path(folder).glob("*.jsonl") for line in path.read_text().splitlines())
    return sorted((TimedEvent(*json.loads(line)) for line in lines), key=lambda event: event.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlooSleepEngine(SleepEngine):
    """Implements `hv_batch.protocol.Engine`. Ranks write their events into the folder `events`."""

    events: str

    def host_rendezvous(self, host: str, world_size: int) -> str:
        return host_store(host, world_size)

    def join(self, place: RankSpec) -> GlooSleepDenoiser:
        record_event(self.events, JOINING, place.rank)
        join_group(place)
        return GlooSleepDenoiser(self.step_seconds, place.rank, self.events, place)


@dataclass(frozen=True, slots=True)
class GlooSleepDenoiser(SleepDenoiser):
    """One rank of a group."""

    events: str
    place: RankSpec

    def self_check(self) -> None:
        self._synchronize()
        record_event(self.events, JOINED, self.place.rank)

    def denoise(
        self,
        params: SamplingParams,
        positive: Any,
        negative: Any | None,
        on_step: OnStep,
        resume: StepState | None = None,
    ) -> np.ndarray:
        """Denoise as `SleepDenoiser` does, with a barrier after every step."""

        def finish_step(done: int, read: Callable[[], StepState], computed: int | None = None) -> None:
            self._synchronize()
            record_event(self.events, STEP, self.place.rank)
            on_step(done, read, computed)

        record_event(self.events, RESUMED if resume else BEGUN, self.place.rank)
        latents = SleepDenoiser.denoise(self, params, positive, negative, finish_step, resume)
        record_event(self.events, ENDED, self.place.rank)
        return latents

    def _synchronize(self) -> None:
        if self.place.plan.world_size > 1:
            dist.barrier()


if TYPE_CHECKING:
    _: type[Engine] = GlooSleepEngine
