"""The arguments and reports of a run's actors: small messages that travel through Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from hv_batch import __version__
from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.licences import TENCENT
from hv_batch.job.log_records import LogSettings, configure_logging
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.latents import sample_identity
from hv_batch.job.records.lease import refuse_other_holder
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.protocol import Engine, UserError


class OtherVersionError(Exception):
    """This process has another version of hv_batch than the driver of its run."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """Everything that the actors of a run share. Every actor gets a copy when it starts."""

    run: ResolvedRun
    engine: Engine
    store: Store
    fingerprint: str
    versions: Mapping[str, str]
    licence: str = TENCENT  # of the rendered files
    log: LogSettings = field(default_factory=LogSettings)
    hooks: Mapping[str, Any] = field(default_factory=dict)  # those of the run's identity
    lease_token: str = ""  # of the run's lease; empty before the run holds it
    earlier: tuple[str, ...] = ()  # former fingerprints of the root with equal pixels (`continuation.equal_earlier`)

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def open_options(self) -> tuple[str, ...]:
        """The options of the engine that the first group decides, such as `attention: auto`."""
        names: tuple[str, ...] = self.engine.open_options() if hasattr(self.engine, "open_options") else ()
        return names

    def sample_identities(self, sample: Sample) -> tuple[str, tuple[str, ...]]:
        """The identity of a sample's latents in this run, and those under which an earlier command may have stored
        them.
        """
        earlier = tuple(sample_identity(sample, fingerprint) for fingerprint in self.earlier)
        return sample_identity(sample, self.fingerprint), earlier

    def check_lease(self) -> None:
        """Raises LeaseLostError if another process has taken over the output root. To be called before writes."""
        if self.lease_token:
            refuse_other_holder(self.store, self.lease_token)

    def configure_actor(self, name: str) -> None:
        """Configure the logging of an actor like the driver's, with the run and the actor's name in every record.

        Raises OtherVersionError if this node has another version of hv_batch than the driver.
        """
        driver = self.versions.get("hv_batch", __version__)
        if driver != __version__:
            raise OtherVersionError(f"the node has hv_batch {__version__} and the driver {driver}")
        configure_logging(self.log, run=short_id(self.fingerprint), worker=name)


def short_id(fingerprint: str) -> str:
    """The short name of the run in log records."""
    return fingerprint[:8]


def see_output_root(store: Store) -> None:
    """Check that this node reads the output root to which the driver writes. Raises UserError if it does not."""
    if not store.exists(layout.RUN):
        node = ray.util.get_node_ip_address()
        raise UserError(
            f"The node {node} does not see the output root {public_url(store.url)}: {layout.RUN}, which the driver has "
            "written, does not exist there. Use storage that every node of the cluster can reach: a URL, or a folder "
            "that is mounted on every node."
        )


@dataclass(frozen=True, slots=True)
class StageReport:
    """How one stage processed one sample. It becomes part of the commit record."""

    seconds: float
    node: str
    worker: str
    details: Mapping[str, Any] = field(default_factory=dict)
    result_bytes: int = 0  # size of the result if the scheduler cannot compute it beforehand; not in the record

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 3), "node": self.node, "worker": self.worker, **self.details}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> StageReport:
        rest = dict(values)
        return StageReport(rest.pop("seconds"), rest.pop("node", ""), rest.pop("worker", ""), rest)


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What became of one decoded video."""

    node: str | None = None  # id of the node on whose disk it waits for the output root; None if it is committed
    look: str = ""  # as of `hv_batch.job.quality.look`; empty if it has no scores, or an earlier try had committed it


@dataclass(frozen=True, slots=True)
class ProgressReport:
    """The answer of an actor to a progress request."""

    count: int  # grows with every step, text or frame
    next_within_s: float = math.inf  # the count grows again within this time; inf if that is not known


@dataclass(slots=True)
class Stopwatch:
    seconds: float = 0.0


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    watch, begun = Stopwatch(), time.monotonic()
    yield watch
    watch.seconds = time.monotonic() - begun
