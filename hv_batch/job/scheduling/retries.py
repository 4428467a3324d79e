"""Retry accounting: charge failures to samples, and build the failure that ends a run without workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.limits import RetryLimits
from hv_batch.job.scheduling.messages import Quarantine
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.stages import Stage

# A retried denoise is encoded again: an encoding costs a thousandth of a denoise, and the embedding may have been lost
# with its node. A retried decode reads the final latents from storage, where they were written before (P4).
RETRY_STAGE = {Stage.ENCODE: Stage.ENCODE, Stage.DENOISE: Stage.ENCODE, Stage.DECODE: Stage.DECODE}

# Samples with these failures are retried after the waiting samples: a poisoned sample must not delay the others, and in
# an outage other samples may succeed.
RETRY_LAST = (FailureClass.POISON, FailureClass.OUTAGE)


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
