"""Retry accounting: charge failures to samples, and decide when failures end the run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.limits import RetryLimits
from hv_batch.job.scheduling.messages import Quarantine, WorkerId
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.stages import Stage

# A retried denoise is encoded again: an encoding costs a thousandth of a denoise, and the embedding may have been lost
# with its node. A retried decode reads the final latents from storage, where they were written before (P4).
RETRY_STAGE = {Stage.ENCODE: Stage.ENCODE, Stage.DENOISE: Stage.ENCODE, Stage.DECODE: Stage.DECODE}

# Samples with these failures are retried after the waiting samples: a poisoned sample must not delay the others, and in
# an outage other samples may succeed.
RETRY_LAST = (FailureClass.POISON, FailureClass.OUTAGE)

# Before the first commit, this many different samples that fail alike end the run, and at least one for each worker.
MIN_SAMPLES_ALIKE = 8

# Errors that a sample raises itself count at once. The others (a lost node may fail many samples at the same moment)
# count only for a sample that they have quarantined.
OWN_ERRORS = (FailureClass.POISON, FailureClass.GPU_OOM)

MAX_FAULTS = 64  # different messages that are remembered; a fault that all samples share comes up again

# Parts of a message that differ between samples with the same fault: addresses, ids and numbers.
VARYING = re.compile(r"\b(0x)?(?=[0-9a-f]*\d)[0-9a-f]{8,}\b|\d+(\.\d+)?", re.I)


@dataclass(slots=True)
class _Fault:
    """The samples and the worker slots that failed with one class and message."""

    samples: set[str] = field(default_factory=set)
    slots: set[int] = field(default_factory=set)


class StopRule:
    """Decides when the failures of samples end the whole run.

    A fault of weights, config or image fails every sample. The run would quarantine its whole manifest, so it stops
    instead: while the output root holds no commit, max(MIN_SAMPLES_ALIKE, workers) different samples that fail with the
    same class and message, on at least two workers of their stage if there are two. Later, `retries.max_quarantined`
    stops it, which is off by default.
    """

    def __init__(self, limits: RetryLimits) -> None:
        self._max_quarantined = limits.max_quarantined
        self._has_commits = False
        self._quarantined = 0
        self._faults: dict[tuple[str, FailureClass, str], _Fault] = {}

    def note_commit(self) -> None:
        """The output root holds a commit, of this or of an earlier run, or a finished video waits for it."""
        self._has_commits = True
        self._faults.clear()

    def note_failure(
        self,
        worker: WorkerId,
        keys: Sequence[str],
        failure: Failure,
        quarantined: int,
        count_workers: Callable[[Collection[int]], int],
    ) -> Failure | None:
        """Count a failed task of `worker` with the samples `keys`. Returns the FATAL failure if the run must stop.

        `quarantined` is how many of the samples it has quarantined. `count_workers(slots)` is how many worker slots of
        the stage have a ready worker or are in `slots`.
        """
        self._quarantined += quarantined
        if self._max_quarantined is not None and self._quarantined > self._max_quarantined:
            return self._fatal(
                failure,
                f"{self._quarantined} samples are quarantined in this run, and retries.max_quarantined allows "
                f"{self._max_quarantined}; the last failed with",
            )
        if self._has_commits or len(keys) != 1 or not (quarantined or failure.kind in OWN_ERRORS):
            return None
        fault = self._fault(worker, keys[0], failure)
        workers = count_workers(fault.slots)
        if len(fault.samples) < max(MIN_SAMPLES_ALIKE, workers) or len(fault.slots) < min(2, workers):
            return None
        return self._fatal(
            failure, f"nothing has been committed, and {len(fault.samples)} different samples failed alike, with"
        )

    def _fault(self, worker: WorkerId, key: str, failure: Failure) -> _Fault:
        message = VARYING.sub("0", failure.first_line.replace(key, "")).strip()
        name = worker.stage.name, failure.kind, message
        fault = self._faults.pop(name, None) or _Fault()
        self._faults[name] = fault  # the latest is last
        if len(self._faults) > MAX_FAULTS:
            del self._faults[next(iter(self._faults))]
        fault.samples.add(key)
        fault.slots.add(worker.slot)
        return fault

    def _fatal(self, failure: Failure, reason: str) -> Failure:
        message = f"{reason} {failure.kind}: {failure.message.rstrip('. ')}"
        if self._quarantined:
            message += (
                f". {self._quarantined} of them are quarantined already; when this is fixed, `--failed-only` renders "
                "them again"
            )
        return replace(failure, kind=FailureClass.FATAL, message=message)


def charge_failure(queues: Queues, keys: Sequence[str], failure: Failure, retries: RetryLimits) -> Iterator[Quarantine]:
    """Requeue the samples of a failed task, or quarantine those that have used up their tries.

    The members of a batch are not charged: each is tried again alone. An OUTAGE charges no sample.
    """
    for key in keys:
        if len(keys) > 1:
            queues.run_alone(key)
        elif failure.kind is not FailureClass.OUTAGE:
            failures = queues.failures(key)
            failures.append(failure)
            if Counter(f.kind for f in failures)[failure.kind] >= retries.tries(failure.kind):
                queues.remove(key)
                yield Quarantine(key, tuple(failures))
                continue
        stage = Stage.ENCODE if failure.begin_anew else RETRY_STAGE[queues.stage_of(key)]
        queues.put_back(key, stage, first=failure.kind not in RETRY_LAST)


def all_workers_lost(stage: Stage, failure: Failure, losses: int, size: str = "") -> Failure:
    """The FATAL failure of a run that has abandoned every worker slot of a stage, or of one group size.

    `failure` is the last loss, `losses` the number of losses in a row that abandon a slot.
    """
    name = size or {Stage.ENCODE: "text encoder", Stage.DENOISE: "denoise group", Stage.DECODE: "VAE decoder"}[stage]
    message = (
        f"every {name} was lost {losses} times in a row, so the samples that need one cannot be processed; the last "
        f"loss: {failure.message}"
    )
    return Failure(FailureClass.FATAL, message, failure.traceback, failure.where)
