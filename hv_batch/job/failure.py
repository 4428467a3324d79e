"""Failure classes: what a failure says about the sample, the worker and the run (design: one table, promise P5).

Only the runtime knows exceptions (Ray's, torch's); it turns each into a `Failure` with one of these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from hv_batch.job.redaction import public_text

MAX_MESSAGE = 2_000  # characters kept of a message or a traceback's tail: enough to debug, bounded in 10 M records
MAX_TRACEBACK = 8_000


class FailureClass(StrEnum):
    POISON = "POISON"  # a deterministic error of this sample
    GPU_OOM = "GPU_OOM"  # out of device memory; one more try on a rebuilt worker
    INFRA = "INFRA"  # lost actor, node or object, collective error, hang: not the sample's fault until it repeats
    OUTAGE = "OUTAGE"  # the output root does not answer: nobody's fault, everything waits for it
    PREEMPTED = "PREEMPTED"  # the node was taken away; never blamed on the sample
    FATAL = "FATAL"  # config, credentials, weights, disk full: the run cannot go on


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed try, small enough to keep and to write into records."""

    kind: FailureClass
    message: str
    traceback: str = ""
    where: str = ""  # the worker, for the operator
    begin_anew: bool = False  # what the sample had reached is gone (its stored latents): it starts over

    @property
    def first_line(self) -> str:
        return self.message.strip().partition("\n")[0]

    def trimmed(self) -> Failure:
        return replace(self, message=self.message[:MAX_MESSAGE], traceback=self.traceback[-MAX_TRACEBACK:])

    def to_dict(self) -> dict[str, Any]:
        """As it is recorded. What went wrong may have been told with the URL of a store, and that with its password."""
        said = {"message": public_text(self.message), "traceback": public_text(self.traceback)}
        return asdict(self) | {"kind": self.kind.value} | said

    @classmethod
    def from_dict(cls, recorded: Mapping[str, Any]) -> Failure:
        """Raises KeyError, TypeError or ValueError for what `to_dict` has not written."""
        return cls(**{**recorded, "kind": FailureClass(recorded["kind"])})
