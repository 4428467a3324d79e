"""The metrics of a run for Prometheus, through Ray's exporter: `ray_hv_*`, each tagged with the name of the run.

Their number does not depend on the manifest: tags are stages, states and causes, and never a sample. A scrape finds
them at the driver's node while the driver runs; the results of a run are in its output root.
"""

from __future__ import annotations

import math
import time

from ray.util.metrics import Counter, Gauge, Histogram

from hv_batch.job.failure import FailureClass
from hv_batch.job.progress import Snapshot
from hv_batch.job.stages import Stage
from hv_batch.runtime.driver.loop_timer import LoopTimer

UPDATE_EVERY_S = 2.0  # Ray drops a gauge that has not been set for a minute, so an unchanged one is set again

# Bucket bounds, from an image of a toy model to an hour of 720p on one GPU.
SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]


class RunMetrics:
    """Needs a connection to Ray. `run` names the output root and must not contain a secret."""

    def __init__(self, run: str) -> None:
        self._samples = Gauge("hv_samples", "Samples of the run, by state.", ("run", "state"))
        self._in_work = Gauge("hv_samples_in_work", "Samples in flight, by stage.", ("run", "stage"))
        self._spooled = Gauge("hv_samples_spooled", "Videos that wait on the disks of nodes.", ("run",))
        self._starting = Gauge("hv_workers_starting", "Workers that wait for resources or load.", ("run",))
        self._seconds = Histogram("hv_task_seconds", "Time of a task that succeeded.", SECONDS, ("run", "stage"))
        self._lost = Counter("hv_groups_lost", "Denoise groups lost after they had started.", ("run", "cause"))
        self._wasted = Counter("hv_denoise_seconds_lost", "Time of denoises that were cut off.", ("run", "cause"))
        self._loop = Gauge("hv_driver_loop_seconds", "Longest iteration of the driver's loop.", ("run",))
        gauges = (self._samples, self._in_work, self._spooled, self._starting, self._loop)
        for metric in (*gauges, self._seconds, self._lost, self._wasted):
            metric.set_default_tags({"run": run})
        self._updated_at = -math.inf

    def update(self, snapshot: Snapshot, timer: LoopTimer) -> None:
        """Set the gauges, at most every UPDATE_EVERY_S."""
        now = time.monotonic()
        if now - self._updated_at < UPDATE_EVERY_S:
            return
        self._updated_at = now
        pending = snapshot.total - snapshot.terminal
        for state, count in (
            ("committed", snapshot.committed),
            ("quarantined", snapshot.quarantined),
            ("pending", pending),
        ):
            self._samples.set(count, {"state": state})
        at = {Stage.ENCODE: snapshot.encoding, Stage.DENOISE: snapshot.denoising, Stage.DECODE: snapshot.decoding}
        for stage, count in at.items():
            self._in_work.set(count, {"stage": stage.name.lower()})
        self._spooled.set(snapshot.spooled)
        self._starting.set(snapshot.starting)
        self._loop.set(timer.take_recent_max_s())

    def task_done(self, stage: Stage, seconds: float) -> None:
        self._seconds.observe(seconds, {"stage": stage.name.lower()})

    def group_lost(self, cause: FailureClass, seconds: float) -> None:
        """A group was lost, `seconds` into a denoise; 0 if it was idle."""
        self._lost.inc(1, {"cause": cause.value})
        if seconds > 0:
            self._wasted.inc(seconds, {"cause": cause.value})
