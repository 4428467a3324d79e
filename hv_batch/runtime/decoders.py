"""VAE-decoder actors: latents in, a video out that is committed, or waits for that on the disk of its node.

Frames never leave the actor that decoded them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from hv_batch.job.errors import Failure
from hv_batch.job.samples import Sample
from hv_batch.protocol import Decoder
from hv_batch.runtime.context import LifeSign, RunContext, StageReport, stopwatch
from hv_batch.runtime.publishing import Publisher, scratch_folder

# Of quick samples, while the next is decoded. To publish one is to wait for the output root six times, and little else.
PUBLISHING_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """One sample of a task, but for its latents."""

    sample: Sample
    stages: Mapping[str, StageReport]  # behind it
    failures: Sequence[Failure]


@ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)
class DecoderActor:
    """Holds the VAE decoder; decodes, encodes to mp4, uploads and commits, one sample after the other."""

    def __init__(self, context: RunContext, name: str) -> None:
        self._context = context
        self._publisher = Publisher(context, name)
        self._pool = ThreadPoolExecutor(PUBLISHING_AT_ONCE, thread_name_prefix="publish")

    def node_id(self) -> str:
        """Ray's id of the node it stands on; the first answer says that it does."""
        return ray.get_runtime_context().get_node_id()

    def load(self) -> None:
        """Not in __init__: an exception here keeps its type on the way to the driver."""
        self._publisher.check()
        self._decoder: Decoder = self._context.engine.decoder(self._context.config.parallel.device)

    def decode(self, tasks: Sequence[DecodeTask], *latents: np.ndarray | None) -> list[str | None]:
        """Render the latents of each (None: those in the output root) and publish, unless another has committed
        already (P1).

        The answers are the id of this node where a video waits on its disk, else None.
        """
        publishing: list[Future[str | None] | None] = []
        with scratch_folder() as folder:
            try:
                for task, own in zip(tasks, latents, strict=True):
                    publishing.append(self._decode(task, own, Path(folder)))
            finally:
                wait(filter(None, publishing))  # whatever becomes of the others, this is to be seen through
        return [answer.result() if answer else None for answer in publishing]

    def _decode(self, task: DecodeTask, latents: np.ndarray | None, folder: Path) -> Future[str | None] | None:
        """None where the sample is committed already."""
        publisher, sample, stages = self._publisher, task.sample, task.stages
        if publisher.is_committed(sample):
            return None
        if latents is None:
            latents, stages = publisher.stored(sample)
        with stopwatch() as decoding:
            media = publisher.write(sample, self._decoder.decode(latents), folder)
        return self._pool.submit(publisher.publish, sample, media, decoding.seconds, stages, task.failures)

    @ray.method(concurrency_group="health", enable_task_events=False)  # a question a second is no news
    def progress(self) -> LifeSign:
        return LifeSign(self._publisher.count)
