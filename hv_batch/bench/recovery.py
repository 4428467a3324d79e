"""Measure denoise groups: the cost of a killed rank, and the idle time of groups between two samples.

The engine sleeps (`hv_batch.bench.gloo_sleep_engine`). All else is the production path: Ray and its actors, the
scheduler, the gloo process group of the ranks, step checkpoints, latents, media and commits. Ranks are killed by
SIGKILL.
"""

from __future__ import annotations

import logging
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from threading import Event, Thread
from typing import Any

from hv_batch.bench.gloo_sleep_engine import BEGUN, ENDED, JOINED, JOINING, STEP, TimedEvent, read_events
from hv_batch.bench.job_throughput import SIDE, rendered
from hv_batch.bench.throughput import attached_handler
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import (
    DecodersConfig,
    Defaults,
    EncodersConfig,
    GroupsConfig,
    ModelConfig,
    ParallelConfig,
)

# Samples whose group loses a rank are short, so that rebuilds take most of the time. Each has a step checkpoint before
# the kill.
STEPS, STEP_SECONDS, KILL_AFTER, CHECKPOINT_EVERY = 8, 0.1, 4, 1

# Samples after those. There must be more than can be in flight: with fewer, the run would release the encoder, as at
# the end of every run, and the last rebuilds would wait until it is started again.
EXTRA_SAMPLES = 16

POLL_S = 0.02  # how often the killer reads the events

PHASES = ("notice", "processes", "meet", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """Seconds of each phase of the recovery from one kill."""

    notice: float  # from the kill until the driver reports the loss of the group
    processes: float  # until every rank has a new process, in the group's reservation
    meet: float  # until all ranks have joined the process group and passed the self-check
    step: float  # until the first step after that, of any sample

    @property
    def phases(self) -> list[float]:
        return [getattr(self, name) for name in PHASES]


@dataclass(frozen=True, slots=True)
class RebuildReport:
    ranks: int
    rebuilds: tuple[Rebuild, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return (minimum, median) seconds of each phase, and of the time from the kill to the end of the phase."""
        took = [rebuild.phases for rebuild in self.rebuilds]
        since = [[sum(phases[: i + 1]) for i in range(len(PHASES))] for phases in took]
        return {
            "ranks": self.ranks,
            "kills": len(self.rebuilds),
            **{
                name: {"took": _min_and_median(column), "since_kill": _min_and_median(sums)}
                for name, column, sums in zip(PHASES, zip(*took, strict=True), zip(*since, strict=True), strict=True)
            },
        }

    def render(self) -> str:
        report = self.to_dict()
        lines = [f"a group of {self.ranks} rank(s), {len(self.rebuilds)} kills; seconds, minimum and median:"]
        lines += [f"{'':12}{'took':>16}{'since the kill':>18}"]
        for name in PHASES:
            took, since = (" {:7.2f} {:7.2f}".format(*report[name][column]) for column in ("took", "since_kill"))
            lines.append(f"{name:12}{took:>16}{since:>18}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleReport:
    """Idle time of each group, as a fraction of the time from its first to its last denoise."""

    steps: int
    step_seconds: float
    samples: int
    shares: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "groups": len(self.shares), "mean": statistics.mean(self.shares)}

    def render(self) -> str:
        return (
            f"{len(self.shares)} group(s), {self.samples} samples of {self.steps} steps of {self.step_seconds:g} s: "
            f"idle {statistics.mean(self.shares):.2%} of the time, "
            f"{min(self.shares):.2%} to {max(self.shares):.2%} by group"
        )


def bench_rebuild(ranks: int, kills: int) -> RebuildReport:
    """Kill one rank during each of `kills` samples, a different rank each time, and measure the recoveries.

    Raises UserError in the cases in which a run raises it.
    """
    with tempfile.TemporaryDirectory(prefix="hv_batch-events-") as folder:
        losses, killer = LossObserver(), RankKiller(folder, ranks, kills)
        config = _config(folder, STEP_SECONDS, STEPS, ranks=ranks, checkpoint_every=CHECKPOINT_EVERY)
        killer.start()
        try:
            with attached_handler(losses), rendered(config, kills + EXTRA_SAMPLES, stopped=killer.done):
                pass
        finally:
            killer.done.set()
            killer.join()
        measured = rebuilds(read_events(folder), killer.killed_at, losses.noticed_at, ranks)
    return RebuildReport(ranks, tuple(measured))


def bench_idle(groups: int, samples: int, steps: int, step_seconds: float, frames: int) -> IdleReport:
    """Render `samples` samples in total with `groups` groups of one rank, and measure their idle time.

    Raises UserError in the cases in which a run raises it.
    """
    with tempfile.TemporaryDirectory(prefix="hv_batch-events-") as folder:
        config = _config(folder, step_seconds, steps, groups=groups, frames=frames)
        with rendered(config, samples):
            pass
        shares = tuple(idle_shares(read_events(folder)))
    return IdleReport(steps=steps, step_seconds=step_seconds, samples=samples, shares=shares)


class RankKiller(Thread):
    """Kills one rank of the group during each of the first `kills` samples, then sets `done`."""

    def __init__(self, folder: str, ranks: int, kills: int) -> None:
        super().__init__(daemon=True)
        self._folder, self._ranks, self._kills = folder, ranks, kills
        self.done = Event()
        self.killed_at: list[float] = []  # on the monotonic clock

    def run(self) -> None:
        while not self.done.wait(POLL_S):
            pids = pids_to_kill(read_events(self._folder), len(self.killed_at))
            if pids and len(self.killed_at) == self._kills:
                self.done.set()
            elif pids:
                self.killed_at.append(time.monotonic())
                os.kill(pids[len(self.killed_at) % self._ranks], signal.SIGKILL)


class LossObserver(logging.Handler):
    """Records the times at which the driver logs the loss of a group that was denoising a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.noticed_at: list[float] = []  # on the monotonic clock

    def emit(self, record: logging.LogRecord) -> None:
        worker, sample = getattr(record, "worker", None), getattr(record, "sample", None)
        if str(worker).startswith("denoise-") and sample and ": INFRA" in record.getMessage():
            self.noticed_at.append(time.monotonic())


def pids_to_kill(events: Sequence[TimedEvent], sample: int) -> dict[int, int] | None:
    """Return the process id of each rank once sample number `sample` (from 0) has done KILL_AFTER steps, else None."""
    begun = [event for event in events if event.rank == 0 and event.what == BEGUN]
    if len(begun) <= sample:
        return None
    start = begun[sample]
    if sum(event.what == STEP and event.pid == start.pid and event.at > start.at for event in events) < KILL_AFTER:
        return None
    return {event.rank: event.pid for event in events if event.what == JOINED}  # later processes replace earlier ones


def rebuilds(
    events: Sequence[TimedEvent], killed_at: Sequence[float], noticed_at: Sequence[float], ranks: int
) -> list[Rebuild]:
    """Return the phases of the recovery from each kill, from the first events of each kind after it."""
    measured = []
    for killed, noticed in zip(killed_at, noticed_at, strict=True):
        later = [event for event in events if event.at > noticed]
        started = max(event.at for event in [event for event in later if event.what == JOINING][:ranks])
        joined = max(event.at for event in [event for event in later if event.what == JOINED][:ranks])
        step = next(event for event in later if event.what == STEP and event.at > joined)
        measured.append(
            Rebuild(notice=noticed - killed, processes=started - noticed, meet=joined - started, step=step.at - joined)
        )
    return measured


def idle_shares(events: Sequence[TimedEvent]) -> list[float]:
    """Return the idle fraction of each group of one rank that has rendered more than one sample."""
    shares = []
    for pid in sorted({event.pid for event in events}):
        own = [event for event in events if event.pid == pid]
        begun, ended = ([event.at for event in own if event.what == what] for what in (BEGUN, ENDED))
        if len(begun) > 1:
            gaps = sum(after - before for before, after in zip(ended, begun[1:], strict=False))
            shares.append(gaps / (ended[-1] - begun[0]))
    return shares


def _config(
    events: str,
    step_seconds: float,
    steps: int,
    *,
    ranks: int = 1,
    groups: int = 1,
    frames: int = 1,
    checkpoint_every: int = 0,
) -> RunConfig:
    options = {"step_seconds": step_seconds, "events": events}
    return RunConfig(
        model=ModelConfig(engine="hv_batch.bench.gloo_sleep_engine:GlooSleepEngine", options=options),
        defaults=Defaults(height=SIDE, width=SIDE, num_frames=frames, num_inference_steps=steps),
        parallel=ParallelConfig(device="cpu", ulysses_degree=ranks),
        groups=GroupsConfig(count=groups, gpus_per_rank=0.0, cpus_per_rank=0.01, checkpoint_every=checkpoint_every),
        encoders=EncodersConfig(gpus=0.0, cpus=0.1, batch_size=1),
        decoders=DecodersConfig(count=2, gpus=0.0, cpus=0.1),
    )


def _min_and_median(seconds: Sequence[float]) -> tuple[float, float]:
    return min(seconds), statistics.median(seconds)
