"""Time the life of denoise groups: what a killed rank costs, and how long groups stand idle between two samples.

The model sleeps (`hv_batch.bench.gloo_sleep_engine`); all else is real: Ray and its actors, the scheduler, the meeting of the
ranks over gloo, step checkpoints, kills by SIGKILL, latents, media and commits.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from threading import Event, Thread
from typing import Any

from hv_batch.bench.gloo_sleep_engine import BEGUN, ENDED, JOINED, JOINING, STEP, TimedEvent, read_notes
from hv_batch.bench.job_throughput import SIDE, rendered
from hv_batch.bench.throughput import attached
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import (
    DecodersConfig,
    Defaults,
    EncodersConfig,
    GroupsConfig,
    ModelConfig,
    ParallelConfig,
)

# Of the samples that are disturbed: short, so that rebuilds are most of the time, with checkpoints before the kill.
STEPS, STEP_SECONDS, KILL_AFTER, CHECKPOINT_EVERY = 8, 0.1, 4, 1

# Samples beyond those: more than are in flight, or the encoder would be let go, as at the end of every run, and the
# last rebuilds would wait for its return.
MORE = 16

LOOK_EVERY_S = 0.02  # for the step to kill after

PHASES = ("notice", "processes", "meet", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """What one kill has cost, in seconds, phase by phase."""

    notice: float  # from the kill until the driver gives the group up
    processes: float  # until every rank has a process again, in the seats of the last life
    meet: float  # until all have joined and proved themselves
    step: float  # until the first step after that is made, of whichever sample

    @property
    def phases(self) -> list[float]:
        return [getattr(self, name) for name in PHASES]


@dataclass(frozen=True, slots=True)
class RebuildReport:
    ranks: int
    rebuilds: tuple[Rebuild, ...]

    def to_dict(self) -> dict[str, Any]:
        """Seconds: (least, median) of every phase, and of the time since the kill at its end."""
        took = [rebuild.phases for rebuild in self.rebuilds]
        since = [[sum(phases[: i + 1]) for i in range(len(PHASES))] for phases in took]
        return {
            "ranks": self.ranks,
            "kills": len(self.rebuilds),
            **{
                name: {"took": _least_and_median(column), "since_kill": _least_and_median(sums)}
                for name, column, sums in zip(PHASES, zip(*took, strict=True), zip(*since, strict=True), strict=True)
            },
        }

    def render(self) -> str:
        found = self.to_dict()
        lines = [f"a group of {self.ranks} rank(s), one killed {len(self.rebuilds)} times; seconds, least and median:"]
        lines += [f"{'':12}{'took':>16}{'since the kill':>18}"]
        for name in PHASES:
            took, since = (" {:7.2f} {:7.2f}".format(*found[name][column]) for column in ("took", "since_kill"))
            lines.append(f"{name:12}{took:>16}{since:>18}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleReport:
    """Shares of the time between a group's first and last denoise in which it denoised nothing, of each group."""

    steps: int
    step_seconds: float
    samples: int
    shares: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "groups": len(self.shares), "mean": statistics.mean(self.shares)}

    def render(self) -> str:
        return (
            f"{len(self.shares)} group(s), {self.samples} samples of {self.steps} steps of {self.step_seconds:g} s: "
            f"idle {statistics.mean(self.shares):.2%} of the time between two denoises, "
            f"{min(self.shares):.2%} to {max(self.shares):.2%} by group"
        )


def bench_rebuild(ranks: int, kills: int) -> RebuildReport:
    """Kill a rank in the middle of each of `kills` samples, another one each time. Raises UserError as a run does."""
    with tempfile.TemporaryDirectory(prefix="hv_batch-notes-") as notes:
        losses, killer = LossObserver(), RankKiller(notes, ranks, kills)
        config = _config(notes, STEP_SECONDS, STEPS, ranks=ranks, checkpoint_every=CHECKPOINT_EVERY)
        killer.start()
        try:
            with attached(losses), rendered(config, kills + MORE, stopped=killer.done):
                pass
        finally:
            killer.done.set()
            killer.join()
        found = rebuilds(read_notes(notes), killer.killed_at, losses.noticed_at, ranks)
    return RebuildReport(ranks, tuple(found))


def bench_idle(groups: int, samples: int, steps: int, step_seconds: float, frames: int) -> IdleReport:
    """Let `groups` of one rank render `samples` in all. Raises UserError as a run does."""
    with tempfile.TemporaryDirectory(prefix="hv_batch-notes-") as notes:
        config = _config(notes, step_seconds, steps, groups=groups, frames=frames)
        with rendered(config, samples):
            pass
        shares = tuple(idle_shares(read_notes(notes)))
    return IdleReport(steps=steps, step_seconds=step_seconds, samples=samples, shares=shares)


class RankKiller(Thread):
    """Kills one rank of the group in the middle of each of the first `kills` samples, then sets `done`."""

    def __init__(self, notes: str, ranks: int, kills: int) -> None:
        super().__init__(daemon=True)
        self._notes, self._ranks, self._kills = notes, ranks, kills
        self.done = Event()
        self.killed_at: list[float] = []

    def run(self) -> None:
        while not self.done.wait(LOOK_EVERY_S):
            gang = gang_in_the_middle(read_notes(self._notes), len(self.killed_at))
            if gang and len(self.killed_at) == self._kills:
                self.done.set()
            elif gang:
                self.killed_at.append(time.monotonic())
                os.kill(gang[len(self.killed_at) % self._ranks], signal.SIGKILL)


class LossObserver(logging.Handler):
    """Records when the driver reported the loss of a group."""

    def __init__(self) -> None:
        super().__init__()
        self.noticed_at: list[float] = []  # on the monotonic clock

    def emit(self, record: logging.LogRecord) -> None:
        if re.match(r"denoise-\S+ with .*: INFRA", record.getMessage()):
            self.noticed_at.append(time.monotonic())


def gang_in_the_middle(notes: Sequence[TimedEvent], sample: int) -> dict[int, int] | None:
    """The pid of each rank, when `sample`, counted from 0, was begun and has made its steps before the kill."""
    begun = [note for note in notes if note.rank == 0 and note.what == BEGUN]
    if len(begun) <= sample:
        return None
    start = begun[sample]
    if sum(note.what == STEP and note.pid == start.pid and note.at > start.at for note in notes) < KILL_AFTER:
        return None
    return {note.rank: note.pid for note in notes if note.what == JOINED}  # of the last life, which noted last


def rebuilds(
    notes: Sequence[TimedEvent], killed_at: Sequence[float], noticed_at: Sequence[float], ranks: int
) -> list[Rebuild]:
    """What each kill has cost: the first notes of every kind after it."""
    found = []
    for killed, noticed in zip(killed_at, noticed_at, strict=True):
        later = [note for note in notes if note.at > noticed]
        there = max(note.at for note in [note for note in later if note.what == JOINING][:ranks])
        stands = max(note.at for note in [note for note in later if note.what == JOINED][:ranks])
        step = next(note for note in later if note.what == STEP and note.at > stands)
        found.append(
            Rebuild(notice=noticed - killed, processes=there - noticed, meet=stands - there, step=step.at - stands)
        )
    return found


def idle_shares(notes: Sequence[TimedEvent]) -> list[float]:
    """Of each group of one rank that has rendered more than one sample."""
    shares = []
    for pid in sorted({note.pid for note in notes}):
        begun, ended = ([note.at for note in notes if note.pid == pid and note.what == what] for what in (BEGUN, ENDED))
        if len(begun) > 1:
            gaps = sum(after - before for before, after in zip(ended, begun[1:], strict=False))
            shares.append(gaps / (ended[-1] - begun[0]))
    return shares


def _config(
    notes: str,
    step_seconds: float,
    steps: int,
    *,
    ranks: int = 1,
    groups: int = 1,
    frames: int = 1,
    checkpoint_every: int = 0,
) -> RunConfig:
    options = {"step_seconds": step_seconds, "notes": notes}
    return RunConfig(
        model=ModelConfig(engine="hv_batch.bench.gloo_sleep_engine:GlooSleepEngine", options=options),
        defaults=Defaults(height=SIDE, width=SIDE, num_frames=frames, num_inference_steps=steps),
        parallel=ParallelConfig(device="cpu", ulysses_degree=ranks),
        groups=GroupsConfig(count=groups, gpus_per_rank=0.0, cpus_per_rank=0.01, checkpoint_every=checkpoint_every),
        encoders=EncodersConfig(gpus=0.0, cpus=0.1, batch_size=1),
        decoders=DecodersConfig(count=2, gpus=0.0, cpus=0.1),
    )


def _least_and_median(seconds: Sequence[float]) -> tuple[float, float]:
    return min(seconds), statistics.median(seconds)
