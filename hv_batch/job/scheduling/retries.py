"""What failures cost: a failed task its samples another try or their place in the run, a lost stage all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.scheduling.limits import RetryLimits
from hv_batch.job.scheduling.messages import Quarantine
from hv_batch.job.scheduling.queues import Queues
from hv_batch.job.stages import Stage

# A retried denoise is encoded anew: an encoding costs a thousandth of a denoise, and the embedding may have been lost
# with the node that held it. A retried decode reads the final latents from storage: they were written first (P4).
RETRY_STAGE = {Stage.ENCODE: Stage.ENCODE, Stage.DENOISE: Stage.ENCODE, Stage.DECODE: Stage.DECODE}

# A sample that is sick must not hold up the others; in an outage, others may be able to go on where this one is not.
GO_BEHIND = (FailureClass.POISON, FailureClass.OUTAGE)


def charge_failure(queues: Queues, keys: Sequence[str], failure: Failure, retries: RetryLimits) -> Iterator[Quarantine]:
    """Put the samples of a failed task back in line, or out of it when their budget is spent.

    The members of a batch are not charged: each is tried again alone. Nor is anybody while the output root is away.
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
        stage = Stage.ENCODE if failure.begin_anew else RETRY_STAGE[queues.place(key)]
        queues.put_back(key, stage, first=failure.kind not in GO_BEHIND)


def all_workers_lost(stage: Stage, failure: Failure, losses: int, size: str = "") -> Failure:
    """Why the run ends when every worker of a stage, or of one size there, was lost so often in a row; `failure` is
    the last loss.
    """
    name = size or {Stage.ENCODE: "text encoder", Stage.DENOISE: "denoise group", Stage.DECODE: "VAE decoder"}[stage]
    message = (
        f"every {name} was lost {losses} times in a row, so no sample can pass it; the last loss: {failure.message}"
    )
    return Failure(FailureClass.FATAL, message, failure.traceback, failure.where)
