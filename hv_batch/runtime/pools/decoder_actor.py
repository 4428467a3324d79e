"""VAE-decoder actors: they decode latents, encode the frames to media files and commit them.

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
from hv_batch.runtime.run_context import ProgressReport, PublishReport, RunContext, StageReport, stopwatch


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """One sample of a task, without its latents."""

    sample: Sample
    stages: Mapping[str, StageReport]  # reports of the stages before the decode
    failures: Sequence[Failure]


@ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)
class DecoderActor:
    """Holds the VAE decoder. Decodes the samples of a task one after the other, then commits them together."""

    def __init__(self, context: RunContext, name: str) -> None:
        context.configure_actor(name)
        self._context = context
        self._publisher = Publisher(context, name)

    def node_id(self) -> str:
        """The id of its Ray node. The driver takes the first answer as the sign that the actor is placed."""
        return ray.get_runtime_context().get_node_id()

    def load(self) -> str:
        """Check the node and load the weights. Not in __init__, where Ray would hide the type of an exception.

        Returns a warning for the log of the run, or an empty text.
        """
        warning = self._publisher.check()
        self._decoder: Decoder = self._context.engine.decoder(self._context.config.parallel.device)
        return warning

    def decode(self, tasks: Sequence[DecodeTask], *latents: np.ndarray | None) -> list[PublishReport]:
        """Decode and commit each sample that is not committed yet (P1).

        `latents` has an entry per task: [C, T, H, W], or None to read them from the output root. Returns a report
        per task.
        """
        made: dict[int, DecodedVideo] = {}
        answers = [PublishReport()] * len(tasks)
        committed = self._context.store.each(self._publisher.is_committed, [task.sample for task in tasks])
        with scratch_folder() as folder:
            try:
                for number, (task, own) in enumerate(zip(tasks, latents, strict=True)):
                    if not committed[number]:
                        made[number] = self._decode(task, own, Path(folder))
            finally:  # an error of one sample must not discard the videos of the others
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

    @ray.method(concurrency_group="health", enable_task_events=False)  # called every second
    def progress(self) -> ProgressReport:
        return ProgressReport(self._publisher.count)
