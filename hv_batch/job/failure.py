"""Failure classes, and the description of one failed attempt (P5).

The runtime maps each exception (Ray's, torch's, ...) to a `Failure` with one of these classes
(`hv_batch.runtime.classify`). The class decides which retry budget the failure counts against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from hv_batch.job.redaction import masked_text

# Characters kept of a message, and of the end of a traceback: enough to debug, and bounded for 10 M records.
MAX_MESSAGE = 2_000
MAX_TRACEBACK = 8_000


class FailureClass(StrEnum):
    POISON = "POISON"  # a deterministic error of this sample
    GPU_OOM = "GPU_OOM"  # out of device memory; retried once on a rebuilt worker
    INFRA = "INFRA"  # lost actor or node, collective error, hang: quarantines the sample only if it repeats
    OUTAGE = "OUTAGE"  # the output root is unreachable: counts against no budget, the run waits
    PREEMPTED = "PREEMPTED"  # the node of the task, or of its input, went away: has a budget of its own
    FATAL = "FATAL"  # config, credentials, weights, disk full: the run cannot continue


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt, small enough to keep in memory and to write into records."""

    kind: FailureClass
    message: str
    traceback: str = ""
    where: str = ""  # the worker, for operators
    begin_anew: bool = False  # the stored latents are gone, so the sample must start again at its first stage

    @property
    def first_line(self) -> str:
        return self.message.strip().partition("\n")[0]

    def trimmed(self) -> Failure:
        return replace(self, message=self.message[:MAX_MESSAGE], traceback=self.traceback[-MAX_TRACEBACK:])

    def to_dict(self) -> dict[str, Any]:
        """The form that is written into records. Secrets are removed from the message and the traceback."""
        redacted = {"message": masked_text(self.message), "traceback": masked_text(self.traceback)}
        return asdict(self) | {"kind": self.kind.value} | redacted

    @classmethod
    def from_dict(cls, recorded: Mapping[str, Any]) -> Failure:
        """Raises KeyError, TypeError or ValueError if `recorded` was not written by `to_dict`."""
        return cls(**{**recorded, "kind": FailureClass(recorded["kind"])})
