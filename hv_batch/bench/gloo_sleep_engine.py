"""An idle engine whose groups are real groups: the ranks meet over gloo, make every step together, and note when.

The notes are for whoever measures on this machine: one file a process, appended to line by line, so that what a killed
rank has noted is there.
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

from hv_batch.bench.sleep_engine import IdleDenoiser, SleepEngine
from hv_batch.engine.parallel.process_group import host_store, join_group
from hv_batch.protocol import OnStep, RankSpec, SamplingParams, StepState

if TYPE_CHECKING:
    from hv_batch.protocol import Engine

JOINING = "joining"  # the process is there, and so are those of the other ranks
JOINED = "joined"
BEGUN = "begun"  # a denoise, from its start
RESUMED = "resumed"  # a denoise, from a step checkpoint
STEP = "step"
ENDED = "ended"


@dataclass(frozen=True, slots=True)
class TimedEvent:
    at: float  # seconds of time.monotonic, which all processes of a Linux machine share
    what: str
    rank: int
    pid: int


def take_note(folder: str, what: str, rank: int) -> None:
    pid = os.getpid()
    with (Path(folder) / f"{pid}.jsonl").open("a") as file:
        file.write(json.dumps([time.monotonic(), what, rank, pid]) + "\n")


def read_notes(folder: str) -> list[TimedEvent]:
    """All that was noted, in the order of time."""
    lines = (line for path in Path(folder).glob("*.jsonl") for line in path.read_text().splitlines())
    return sorted((TimedEvent(*json.loads(line)) for line in lines), key=lambda note: note.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlooSleepEngine(SleepEngine):
    """Satisfies `hv_batch.protocol.Engine`; `notes` is the folder to note in."""

    notes: str

    def host_rendezvous(self, host: str, world_size: int) -> str:
        return host_store(host, world_size)

    def join(self, place: RankSpec) -> GangDenoiser:
        take_note(self.notes, JOINING, place.rank)
        join_group(place)
        return GangDenoiser(self.step_seconds, place.rank, self.notes, place)


@dataclass(frozen=True, slots=True)
class GangDenoiser(IdleDenoiser):
    """One rank."""

    notes: str
    place: RankSpec

    def self_check(self) -> None:
        self._meet()
        take_note(self.notes, JOINED, self.place.rank)

    def denoise(
        self,
        params: SamplingParams,
        positive: Any,
        negative: Any | None,
        on_step: OnStep,
        resume: StepState | None = None,
    ) -> np.ndarray:
        """As the idle engine's, with all ranks in step."""

        def meet_and_note(done: int, read: Callable[[], np.ndarray] | None) -> None:
            self._meet()
            take_note(self.notes, STEP, self.place.rank)
            on_step(done, read)

        take_note(self.notes, RESUMED if resume else BEGUN, self.place.rank)
        latents = IdleDenoiser.denoise(self, params, positive, negative, meet_and_note, resume)
        take_note(self.notes, ENDED, self.place.rank)
        return latents

    def _meet(self) -> None:
        if self.place.plan.world_size > 1:
            dist.barrier()


if TYPE_CHECKING:
    _: type[Engine] = GlooSleepEngine
