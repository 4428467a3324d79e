"""Object-store budget: the bytes that results between the stages take in Ray's object stores, by producing worker.

A result stays on the node of the worker that produced it until the next stage has processed it. So no object store
fills up if each worker limits its own results: those that exist and those of its running task must stay within its
share (`StageLimits.result_bytes`). A worker without outstanding results may always start one task, however large.

The size of latents follows from their shape. The size of an embedding is known only when it exists. Until then each
counts as the largest so far, or as ASSUMED_EMBEDDING_BYTES.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from hv_batch.architecture import MAX_TEXT_TOKENS
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage

# Two prompts (classifier-free guidance) of an image, 4096 wide in bfloat16: the maximum of the released encoders.
ASSUMED_EMBEDDING_BYTES = 2 * MAX_TEXT_TOKENS * 4096 * 2

Producer = tuple[Stage, int]  # stage and slot of a worker, without its incarnation


@dataclass(slots=True)
class _SampleResults:
    latent_bytes: int  # expected
    results: dict[Stage, tuple[Producer, int]] = field(default_factory=dict)  # by producing stage: producer and bytes


class ObjectStoreBudget:
    """Accounts for the results of all samples in flight. `share` is the budget in bytes of one worker of each stage."""

    def __init__(self, share: Mapping[Stage, float]) -> None:
        self._share = share
        self._samples: dict[str, _SampleResults] = {}
        self._held: Counter[Producer] = Counter()  # bytes
        self._largest_embedding = 0  # bytes

    def track(self, key: str, latent_bytes: int) -> None:
        """Begin to account for a sample."""
        self._samples[key] = _SampleResults(latent_bytes)

    def room(self, worker: WorkerId, keys: Sequence[str]) -> int:
        """How many of the samples, in order, the worker may process now: at least one if it has no results."""
        held = self._held[worker.stage, worker.slot]
        sums = accumulate(self._expected(worker.stage, key) for key in keys)
        fitting = sum(held + expected <= self._share[worker.stage] for expected in sums)
        return fitting if held else max(1, fitting)

    def reserve(self, worker: WorkerId, keys: Sequence[str]) -> None:
        """The worker starts a task of its stage: reserve the expected bytes of its results."""
        for key in keys:
            self._set(key, (worker.stage, worker.slot), self._expected(worker.stage, key))

    def record(self, worker: WorkerId, keys: Sequence[str], result_bytes: Sequence[int]) -> None:
        """The results exist. `result_bytes` are their sizes; a sample without one keeps its expected size."""
        for key, size in zip(keys, result_bytes, strict=False):
            self._set(key, (worker.stage, worker.slot), size)
        if worker.stage is Stage.ENCODE:
            self._largest_embedding = max(self._largest_embedding, *result_bytes, 0)

    def release(self, key: str, stage: Stage | None) -> None:
        """Release all results of the sample except the input of `stage`, its next stage.

        If `stage` is None, the sample is no longer in flight.
        """
        results = self._samples[key].results
        for producing_stage in [each for each in results if stage is None or each + 1 != stage]:
            producer, size = results.pop(producing_stage)
            self._held[producer] -= size
        if stage is None:
            del self._samples[key]

    def _set(self, key: str, producer: Producer, size: int) -> None:
        results, stage = self._samples[key].results, producer[0]
        if stage in results:
            earlier_producer, earlier_size = results[stage]
            self._held[earlier_producer] -= earlier_size
        results[stage] = (producer, size)
        self._held[producer] += size

    def _expected(self, stage: Stage, key: str) -> int:
        if stage is Stage.ENCODE:
            return self._largest_embedding or ASSUMED_EMBEDDING_BYTES
        return self._samples[key].latent_bytes if stage is Stage.DENOISE else 0
