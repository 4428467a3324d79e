"""The metrics of a run for Prometheus, through Ray's exporter: `ray_hv_*`, each tagged with the name of the run.

Their number does not depend on the manifest: tags are stages, states, causes, uses and looks, and never a sample. A
scrape finds them at the driver's node while the driver runs. Ray removes a gauge some seconds after its driver has
ended, and exports the last values when the driver disconnects. The results of a run are in its output root.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

from hv_batch.job.failure import FailureClass
from hv_batch.job.progress import Snapshot
from hv_batch.job.quality import GOOD, LOOKS
from hv_batch.job.stages import STAGES, Stage
from hv_batch.runtime.driver.gpu_ledger import USES

UPDATE_EVERY_S = 2.0  # Ray drops a gauge that has not been set for a minute, so an unchanged one is set again

# Bucket bounds, from an image of a toy model to an hour of 720p on one GPU.
SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]


@dataclass(frozen=True, slots=True)
class Definition:
    """A metric. `tags` are its tags besides `run`, each with all of its values."""

    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def series(self) -> Iterator[dict[str, str]]:
        """The tags of each series of one run."""
        return (dict(zip(self.tags, values, strict=True)) for values in product(*self.tags.values()))


_STAGE = {"stage": tuple(stage.name.lower() for stage in STAGES)}
_CAUSE = {"cause": tuple(cause.value for cause in FailureClass)}

DEFINITIONS: Mapping[str, Definition] = {
    "hv_samples": Definition("gauge", "samples", {"state": ("committed", "quarantined", "pending")}),
    "hv_samples_in_work": Definition("gauge", "samples in flight", _STAGE),
    "hv_samples_spooled": Definition("gauge", "finished videos on the disks of nodes"),
    "hv_eta_seconds": Definition("gauge", "time until all samples are done; absent before the second one is done"),
    "hv_workers_starting": Definition("gauge", "workers that wait for resources or load weights"),
    "hv_driver_loop_seconds": Definition(
        "gauge", "longest iteration of the driver's loop in the last seconds; over 1 s, the driver logs a warning"
    ),
    "hv_driver_started_timestamp_seconds": Definition("gauge", "when the driver started to render, in Unix time"),
    "hv_driver_heartbeat_timestamp_seconds": Definition("gauge", "when the driver's loop last ran"),
    "hv_progress_timestamp_seconds": Definition(
        "gauge", "when a step, a frame or a task was last finished; the start of the driver before that"
    ),
    "hv_driver_ended_timestamp_seconds": Definition(
        "gauge", "when the driver ended after all samples or a stop; 0 while it runs, and if it fails"
    ),
    "hv_output_root_away_seconds": Definition("gauge", "how long the output root has not answered; 0 while it does"),
    "hv_spool_unusable": Definition(
        "gauge", "1 if videos cannot wait on the disks of nodes: the spool is disabled, or a decode found no room"
    ),
    "hv_task_seconds": Definition("histogram", "time of the tasks that succeeded", _STAGE),
    "hv_videos": Definition("counter", "videos that this command rendered, by their look", {"look": (GOOD, *LOOKS)}),
    "hv_groups_lost": Definition("counter", "groups that were lost after their start", _CAUSE),
    "hv_denoise_seconds_lost": Definition("counter", "time of the denoises that were cut off", _CAUSE),
    "hv_gpu_seconds": Definition("counter", "time of the GPUs that the workers reserve, by use", {"use": USES}),
    "hv_gpu_seconds_lost": Definition(
        "counter", "part of `ray_hv_gpu_seconds_total`: tasks that failed or were cut off", _CAUSE
    ),
}


def exported_names(name: str, kind: str) -> tuple[str, ...]:
    """The names under which Prometheus sees a metric."""
    suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    return tuple(f"ray_{name}{suffix}" for suffix in suffixes[kind])


class RunMetrics:
    """Needs a connection to Ray. `run` names the output root and must not contain a secret."""

    def __init__(self, run: str) -> None:
        self._metrics = {name: _create(name, definition, run) for name, definition in DEFINITIONS.items()}
        self._updated_at = -math.inf
        self._started_at = self._progressed_at = time.time()

    def update(self, snapshot: Snapshot, *, loop_s: float, away_s: float, is_spool_unusable: bool) -> None:
        """Set all gauges. `loop_s` is the longest recent iteration, `away_s` the duration of an outage."""
        pending = snapshot.total - snapshot.terminal
        counts = {"committed": snapshot.committed, "quarantined": snapshot.quarantined, "pending": pending}
        for state, count in counts.items():
            self._gauge("hv_samples", count, state=state)
        at = {Stage.ENCODE: snapshot.encoding, Stage.DENOISE: snapshot.denoising, Stage.DECODE: snapshot.decoding}
        for stage, count in at.items():
            self._gauge("hv_samples_in_work", count, stage=stage.name.lower())
        self._gauge("hv_samples_spooled", snapshot.spooled)
        if snapshot.eta_s is not None:
            self._gauge("hv_eta_seconds", snapshot.eta_s)
        self._gauge("hv_workers_starting", snapshot.starting)
        self._gauge("hv_driver_loop_seconds", loop_s)
        self._gauge("hv_driver_started_timestamp_seconds", self._started_at)
        self._gauge("hv_driver_heartbeat_timestamp_seconds", time.time())
        self._gauge("hv_driver_ended_timestamp_seconds", 0.0)
        self._gauge("hv_progress_timestamp_seconds", self._progressed_at)
        self._gauge("hv_output_root_away_seconds", away_s)
        self._gauge("hv_spool_unusable", float(is_spool_unusable))

    def is_due(self) -> bool:
        """Whether the gauges should be set, which is the case every UPDATE_EVERY_S."""
        now = time.monotonic()
        if now - self._updated_at < UPDATE_EVERY_S:
            return False
        self._updated_at = now
        return True

    def progressed(self) -> None:
        """A worker has finished a step, a frame or a task."""
        self._progressed_at = time.time()

    def ended(self) -> None:
        """The driver ends after all samples or a stop."""
        self._gauge("hv_driver_ended_timestamp_seconds", time.time())

    def task_done(self, stage: Stage, seconds: float, looks: Iterable[str]) -> None:
        """`looks` are those of the scored videos of a decode."""
        self._metrics["hv_task_seconds"].observe(seconds, {"stage": stage.name.lower()})
        for look in looks:
            self._count("hv_videos", 1, look=look)

    def task_lost(self, cause: FailureClass, gpu_seconds: float) -> None:
        """A task failed or was cut off after `gpu_seconds`."""
        self._count("hv_gpu_seconds_lost", gpu_seconds, cause=cause.value)

    def group_lost(self, cause: FailureClass, seconds: float) -> None:
        """A group was lost, `seconds` into a denoise; 0 if it was idle."""
        self._count("hv_groups_lost", 1, cause=cause.value)
        self._count("hv_denoise_seconds_lost", seconds, cause=cause.value)

    def gpus_used(self, seconds: Mapping[str, float]) -> None:
        """GPU-seconds by use."""
        for use, amount in seconds.items():
            self._count("hv_gpu_seconds", amount, use=use)

    def _gauge(self, name: str, value: float, **tags: str) -> None:
        self._metrics[name].set(value, tags)

    def _count(self, name: str, amount: float, **tags: str) -> None:
        if amount > 0:  # Ray refuses 0
            self._metrics[name].inc(amount, tags)


def _create(name: str, definition: Definition, run: str) -> Any:
    tags = ("run", *definition.tags)
    if definition.kind == "histogram":
        return Histogram(name, definition.meaning, SECONDS, tags).set_default_tags({"run": run})
    kind = Counter if definition.kind == "counter" else Gauge
    metric = kind(name, definition.meaning, tags).set_default_tags({"run": run})
    if definition.kind == "counter":
        for series in definition.series():
            # Without a first value, `increase()` misses the losses of the scrape in which a series appears. `inc`
            # refuses 0; tests/cluster/test_metrics.py checks that this is exported.
            metric._record(0, series)
    return metric
