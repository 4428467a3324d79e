"""VAE-decoder actors: latents in, a video out that is committed, or waits for that on the disk of its node.

Frames never leave the actor that decoded them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from hv_batch.job.failure import Failure
from hv_batch.job.manifest.samples import Sample
from hv_batch.protocol import Decoder
from hv_batch.runtime.publisher import DecodedVideo, Publisher, scratch_folder
from hv_batch.runtime.run_context import ProgressReport, RunContext, StageReport, stopwatch


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
        context.configure_actor(name)
        self._context = context
        self._publisher = Publisher(context, name)

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
        made: dict[int, DecodedVideo] = {}
        answers: list[str | None] = [None] * len(tasks)
        committed = self._context.store.each(self._publisher.is_committed, [task.sample for task in tasks])
        with scratch_folder() as folder:
            try:
                for number, (task, own) in enumerate(zip(tasks, latents, strict=True)):
                    if not committed[number]:
                        made[number] = self._decode(task, own, Path(folder))
            finally:  # whatever becomes of the others
                for number, answer in zip(made, self._publisher.publish(list(made.values())), strict=True):
                    answers[number] = answer
        return answers

    def _decode(self, task: DecodeTask, latents: np.ndarray | None, folder: Path) -> DecodedVideo:
        sample, stages = task.sample, task.stages
        if latents is None:
            latents, stages = self._publisher.stored(sample)
        with stopwatch() as decoding:
            media = self._publisher.write(sample, self._decoder.decode(latents), folder)
        return DecodedVideo(sample, media, decoding.seconds, stages, task.failures)

    @ray.method(concurrency_group="health", enable_task_events=False)  # a question a second is no news
    def progress(self) -> ProgressReport:
        return ProgressReport(self._publisher.count)
