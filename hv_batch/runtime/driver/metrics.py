"""What a run tells Prometheus, by way of Ray's own exporter: `ray_hv_*`, each with the name of the run as a tag.

Few series, whatever the manifest's length: tags are stages, states and causes, and never a sample. A scrape finds them
at the node of the driver for as long as the driver lives; what a run came to stays in its output root.
"""

from __future__ import annotations

import math
import time

from ray.util.metrics import Counter, Gauge, Histogram

from hv_batch.job.failure import FailureClass
from hv_batch.job.progress import Snapshot
from hv_batch.job.stages import Stage
from hv_batch.runtime.driver.loop_timer import LoopTimer

SHOW_EVERY_S = 2.0  # Ray forgets a gauge that has not been set for a minute, so an unchanged one is set again

# From a picture on a toy model to an hour of 720p on one GPU, half a decade apart.
SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]


class RunMetrics:
    """Needs a Ray that is connected. `run` names the output root; no secret may be in it."""

    def __init__(self, run: str) -> None:
        self._samples = Gauge("hv_samples", "Samples of the run, by how they stand.", ("run", "state"))
        self._in_work = Gauge("hv_samples_in_work", "Samples in flight, by the stage they are at.", ("run", "stage"))
        self._spooled = Gauge("hv_samples_spooled", "Videos that wait on disks of nodes.", ("run",))
        self._starting = Gauge("hv_workers_starting", "Workers that wait for room or load.", ("run",))
        self._seconds = Histogram("hv_task_seconds", "Time of a task that succeeded.", SECONDS, ("run", "stage"))
        self._lost = Counter("hv_groups_lost", "Denoise groups lost after they had started.", ("run", "cause"))
        self._wasted = Counter("hv_denoise_seconds_lost", "Time of denoises that were cut off.", ("run", "cause"))
        self._loop = Gauge("hv_driver_loop_seconds", "Longest iteration of the driver's loop of late.", ("run",))
        gauges = (self._samples, self._in_work, self._spooled, self._starting, self._loop)
        for metric in (*gauges, self._seconds, self._lost, self._wasted):
            metric.set_default_tags({"run": run})
        self._shown = -math.inf

    def show(self, snapshot: Snapshot, timer: LoopTimer) -> None:
        """Set the gauges, at most every SHOW_EVERY_S."""
        now = time.monotonic()
        if now - self._shown < SHOW_EVERY_S:
            return
        self._shown = now
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
        """`seconds` into a denoise; 0 when it was idle."""
        self._lost.inc(1, {"cause": cause.value})
        if seconds > 0:
            self._wasted.inc(seconds, {"cause": cause.value})
