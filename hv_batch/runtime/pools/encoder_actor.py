"""Text-encoder actors: prompts in, one embedding object a sample out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle

from hv_batch.job.log_records import log_fields
from hv_batch.protocol import SamplingParams
from hv_batch.runtime.pools.prompt_encoder import Embedder, Text
from hv_batch.runtime.run_context import ProgressReport, RunContext, StageReport, stopwatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """One sample of a task."""

    key: str
    attempt: int
    params: SamplingParams


@ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)
class EncoderActor:
    """Holds both text towers. Retries are the scheduler's business alone, hence no restarts by Ray."""

    def __init__(self, context: RunContext, name: str) -> None:
        context.configure_actor(name)
        self._context = context
        self._name = name
        self._embedder: Embedder | None = None

    def node_id(self) -> str:
        """Ray's id of the node it stands on; the first answer says that it does."""
        return ray.get_runtime_context().get_node_id()

    def load(self) -> None:
        """Not in __init__: an exception here keeps its type on the way to the driver."""
        self._embedder = Embedder(self._context.engine.text_encoder(self._context.config.parallel.device))

    def encode(self, tasks: Sequence[EncodeTask]) -> tuple[Any, ...]:
        """One (positive, negative or None) pair for each of `tasks`, then the reports; each its own Ray object."""
        assert self._embedder is not None
        wanted = [_texts(task.params) for task in tasks]
        with stopwatch() as watch:
            embeddings, encoded = self._embedder.embed(text for texts in wanted for text in texts)
        node = ray.util.get_node_ip_address()
        pairs, reports, told = [], [], set[Text]()
        for task, texts in zip(tasks, wanted, strict=True):
            positive, negative = embeddings[texts[0]], embeddings[texts[1]] if len(texts) > 1 else None
            new = (encoded & set(texts)) - told  # each counts for the first sample of the batch that needs it
            told |= new
            details = {
                "num_tokens": positive.num_tokens,
                "tokens_lost": positive.tokens_lost,
                "encoded": len(new),
                "recalled": len(texts) - len(new),
            }
            pair = (positive, negative)
            pairs.append(pair)
            weight = len(cloudpickle.dumps(pair))  # as Ray will: a view of a larger tensor takes that tensor along
            reports.append(StageReport(watch.seconds / len(tasks), node, self._name, details, weight))
            with log_fields(sample=task.key, attempt=task.attempt):
                logger.info(f"encoded {positive.num_tokens} text tokens")
        return *pairs, reports

    @ray.method(concurrency_group="health", enable_task_events=False)  # a question a second is no news
    def progress(self) -> ProgressReport:
        return ProgressReport(self._embedder.count if self._embedder else 0)


def _texts(params: SamplingParams) -> list[Text]:
    """The prompt and, where it is rendered, the negative one."""
    prompts = [params.prompt, params.negative_prompt] if params.uses_cfg else [params.prompt]
    return [Text(prompt, params.is_image) for prompt in prompts]
