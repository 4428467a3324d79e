"""The engine of the chaos runs: the fake engine, with faults that its class leaves to the test."""

from __future__ import annotations

from hv_batch.job.storage import object_store
from hv_batch.runtime.groups import step_checkpoints
from tests.support.doubles import FakeEngine

PART_BYTES = 1024  # of a multipart upload: the tiny videos of these runs are uploaded in parts, as large ones are
STEP_LIMIT_S = 15.0  # after which a step is overdue; the machine may be busy


class ChaosEngine(FakeEngine):
    """Prompts with "!oom-<stage>" run out of GPU memory."""

    def _arm(self) -> None:
        super()._arm()
        object_store.PART_BYTES = PART_BYTES
        step_checkpoints.MIN_LIMIT_S = STEP_LIMIT_S

    def misbehave(self, stage: str, text: str) -> None:
        if f"!oom-{stage}" in text:
            import torch  # takes seconds of CPU, and most actors never need it

            raise torch.OutOfMemoryError("CUDA out of memory, as the prompt says")
        super().misbehave(stage, text)
