"""The fake engine of the chaos runs, with faults that its class leaves to the test."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hv_batch.job.storage import object_store
from hv_batch.runtime.groups import step_checkpoints
from tests.support.doubles import FakeEmbedding, FakeEncoder, FakeEngine

PART_BYTES = 1024  # of a multipart upload: the tiny videos of these runs are uploaded in parts, as large ones are
STEP_LIMIT_S = 15.0  # after which a step is overdue; the machine may be busy
EMBEDDING_BYTES = 150_000  # more than Ray keeps in the memory of the driver: it can be lost with its node


def arm() -> None:
    """Shorter limits in the process of an actor."""
    object_store.PART_BYTES = PART_BYTES
    step_checkpoints.MIN_LIMIT_S = STEP_LIMIT_S


@dataclass(frozen=True)
class LargeEmbedding(FakeEmbedding):
    content: bytes = b""


class LargeEncoder(FakeEncoder):
    def encode(self, prompts, *, image):
        found = super().encode(prompts, image=image)
        return [LargeEmbedding(each.text, each.num_tokens, content=os.urandom(EMBEDDING_BYTES)) for each in found]


class ChaosEngine(FakeEngine):
    """Prompts with "!oom-<stage>" run out of GPU memory. "begin" is the stage before the first step of an attempt."""

    def _arm(self) -> None:
        super()._arm()
        arm()

    def text_encoder(self, device):
        self.mark_gpus("encoder")
        return LargeEncoder(self)

    def join(self, place):
        denoiser = super().join(place)
        denoise = denoiser.denoise

        def denoise_or_fail(params, positive, negative, on_step, resume=None):
            self.misbehave("begin", params.prompt)
            return denoise(params, positive, negative, on_step, resume)

        denoiser.denoise = denoise_or_fail
        return denoiser

    def misbehave(self, stage: str, text: str) -> None:
        if f"!oom-{stage}" in text:
            import torch  # takes seconds of CPU, and most actors never need it

            raise torch.OutOfMemoryError("CUDA out of memory, as the prompt says")
        super().misbehave(stage, text)
