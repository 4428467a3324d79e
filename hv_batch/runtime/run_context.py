"""What every actor of a run is given, and what it reports back: small messages that travel through Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.log_records import LogSettings, configure_logging
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.protocol import Engine, UserError


@dataclass(frozen=True, slots=True)
class RunContext:
    """One run as its actors see it."""

    run: ResolvedRun
    engine: Engine
    store: Store
    fingerprint: str
    versions: Mapping[str, str]
    log: LogSettings = LogSettings()

    @property
    def config(self) -> RunConfig:
        return self.run.config

    def configure_actor(self, name: str) -> None:
        """In an actor of this run: log as the driver does, with the run and the actor's name in every record."""
        configure_logging(self.log, run=short_id(self.fingerprint), worker=name)


def short_id(fingerprint: str) -> str:
    """The run as log records name it."""
    return fingerprint[:8]


def see_output_root(store: Store) -> None:
    """Raises UserError where the output root is not the one that the driver has claimed."""
    if not store.exists(layout.RUN):
        node = ray.util.get_node_ip_address()
        raise UserError(
            f"The node {node} does not see the output root {public_url(store.url)}: it finds no {layout.RUN} there, "
            "which the driver has written. Give storage that every node of the cluster shares, as a URL or as a folder "
            "that is mounted everywhere."
        )


@dataclass(frozen=True, slots=True)
class StageReport:
    """What one stage did for one sample: goes into the commit record."""

    seconds: float
    node: str
    worker: str
    details: Mapping[str, Any] = field(default_factory=dict)
    result_bytes: int = 0  # of what it handed over, where nobody knows that before; for the scheduler, not the record

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 3), "node": self.node, "worker": self.worker, **self.details}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> StageReport:
        rest = dict(values)
        return StageReport(rest.pop("seconds"), rest.pop("node"), rest.pop("worker"), rest)


@dataclass(frozen=True, slots=True)
class ProgressReport:
    """What an actor answers while it works, whatever it is at."""

    count: int  # grows with all progress
    next_within_s: float = math.inf  # the count grows again within this time; inf if that is not known


@dataclass(slots=True)
class Stopwatch:
    seconds: float = 0.0


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    watch, begun = Stopwatch(), time.monotonic()
    yield watch
    watch.seconds = time.monotonic() - begun
