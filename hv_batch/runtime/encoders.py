"""Text-encoder actors: prompts in, one embedding object a sample out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from hv_batch.protocol import Embedding, SamplingParams, TextEncoder
from hv_batch.runtime.context import RunContext, StageReport, stopwatch


@ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)
class EncoderActor:
    """Holds both text towers. Retries are the scheduler's business alone, hence no restarts by Ray."""

    def __init__(self, context: RunContext, name: str) -> None:
        self._context = context
        self._name = name
        self._encoded = 0

    def node_id(self) -> str:
        """Ray's id of the node it stands on; the first answer says that it does."""
        return ray.get_runtime_context().get_node_id()

    def load(self) -> None:
        """Not in __init__: an exception here keeps its type on the way to the driver."""
        self._encoder: TextEncoder = self._context.engine.text_encoder(self._context.config.parallel.device)

    def encode(self, samples: Sequence[SamplingParams]) -> tuple[Any, ...]:
        """One (positive, negative or None) pair for each of `samples`, then the reports; each its own Ray object."""
        with stopwatch() as watch:
            embeddings = self._embed(samples)
        node = ray.util.get_node_ip_address()
        pairs = [(embeddings[s.prompt, s.is_image], _negative(embeddings, s)) for s in samples]
        reports = [
            StageReport(
                watch.seconds / len(samples),
                node,
                self._name,
                {"num_tokens": positive.num_tokens, "tokens_lost": positive.tokens_lost},
            )
            for positive, _ in pairs
        ]
        return *pairs, reports

    def _embed(self, samples: Sequence[SamplingParams]) -> dict[tuple[str, bool], Embedding]:
        texts = {(s.prompt, s.is_image) for s in samples} | {
            (s.negative_prompt, s.is_image) for s in samples if s.uses_cfg
        }
        embeddings: dict[tuple[str, bool], Embedding] = {}
        for image in (False, True):
            prompts = sorted(prompt for prompt, is_image in texts if is_image is image)
            if prompts:
                found = self._encoder.encode(prompts, image=image)
                embeddings.update({(prompt, image): e for prompt, e in zip(prompts, found, strict=True)})
                self._encoded += len(prompts)
        return embeddings

    @ray.method(concurrency_group="health")
    def progress(self) -> int:
        return self._encoded


def _negative(embeddings: dict[tuple[str, bool], Embedding], params: SamplingParams) -> Embedding | None:
    return embeddings[params.negative_prompt, params.is_image] if params.uses_cfg else None
