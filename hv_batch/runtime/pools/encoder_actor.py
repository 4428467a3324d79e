"""Text-encoder actors: they encode the prompts of a task and return one embedding object per sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle

from hv_batch.job.log_records import log_fields
from hv_batch.runtime.pools.prompt_encoder import Embedder, Text
from hv_batch.runtime.run_context import ProgressReport, RunContext, StageReport, stopwatch
from hv_batch.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """One sample of a task."""

    key: str
    attempt: int
    params: SamplingParams


@ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)
class EncoderActor:
    """Holds both text encoders. Ray must not restart it, because only the scheduler decides about retries."""

    def __init__(self, context: RunContext, name: str) -> None:
        context.configure_actor(name)
        self._context = context
        self._name = name
        self._embedder: Embedder | None = None

    def node_id(self) -> str:
        """The id of its Ray node. The driver takes the first answer as the sign that the actor is placed."""
        return ray.get_runtime_context().get_node_id()

    def load(self) -> None:
        """Load the weights. Not in __init__, where Ray would hide the type of an exception from the driver."""
        self._embedder = Embedder(self._context.engine.text_encoder(self._context.config.parallel.device))

    def encode(self, tasks: Sequence[EncodeTask]) -> tuple[Any, ...]:
        """Returns a pair (positive embedding, negative embedding or None) per task, then the list of reports.

        Each return value is a Ray object of its own (`num_returns`).
        """
        assert self._embedder is not None
        wanted = [_texts(task.params) for task in tasks]
        with stopwatch() as watch:
            embeddings, encoded = self._embedder.embed(text for texts in wanted for text in texts)
        node = ray.util.get_node_ip_address()
        pairs, reports, counted = [], [], set[Text]()
        for task, texts in zip(tasks, wanted, strict=True):
            positive, negative = embeddings[texts[0]], embeddings[texts[1]] if len(texts) > 1 else None
            new = (encoded & set(texts)) - counted  # each text counts for the first sample of the task that needs it
            counted |= new
            details = {
                "num_tokens": positive.num_tokens,
                "tokens_lost": positive.tokens_lost,
                "negative_tokens_lost": negative.tokens_lost if negative else 0,
                "encoded": len(new),
                "recalled": len(texts) - len(new),
            }
            pair = (positive, negative)
            pairs.append(pair)
            size = len(cloudpickle.dumps(pair))  # as Ray serializes it: with the whole tensor behind a view
            reports.append(StageReport(watch.seconds / len(tasks), node, self._name, details, size))
            with log_fields(sample=task.key, attempt=task.attempt):
                logger.info(f"encoded {positive.num_tokens} text tokens")
                for which, text in (("prompt", positive), ("negative prompt", negative)):
                    if text is not None and text.tokens_lost:
                        logger.warning(f"the {which} is too long: its last {text.tokens_lost} tokens are ignored")
        return *pairs, reports

    @ray.method(concurrency_group="health", enable_task_events=False)  # called every second
    def progress(self) -> ProgressReport:
        return ProgressReport(self._embedder.count if self._embedder else 0)


def _texts(params: SamplingParams) -> list[Text]:
    """The prompt and, with classifier-free guidance, the negative prompt."""
    prompts = [params.prompt, params.negative_prompt] if params.uses_cfg else [params.prompt]
    return [Text(prompt, params.is_image) for prompt in prompts]
