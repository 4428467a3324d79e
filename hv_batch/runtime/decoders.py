"""VAE-decoder actors: latents in, a video out that is committed, or waits for that on the disk of its node.

Frames never leave the actor that decoded them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import ray

from hv_batch.job.errors import Failure
from hv_batch.job.samples import Sample
from hv_batch.protocol import Decoder
from hv_batch.runtime.context import LifeSign, RunContext, StageReport, stopwatch
from hv_batch.runtime.publishing import Publisher, scratch_folder


@ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)
class DecoderActor:
    """Holds the VAE decoder; decodes, encodes to mp4, uploads and commits one sample at a time."""

    def __init__(self, context: RunContext, name: str) -> None:
        self._context = context
        self._publisher = Publisher(context, name)

    def node_id(self) -> str:
        """Ray's id of the node it stands on; the first answer says that it does."""
        return ray.get_runtime_context().get_node_id()

    def load(self) -> None:
        """Not in __init__: an exception here keeps its type on the way to the driver."""
        self._publisher.check()
        self._decoder: Decoder = self._context.engine.decoder(self._context.config.parallel.device)

    def decode(
        self,
        sample: Sample,
        latents: np.ndarray | None,
        stages: Mapping[str, StageReport],
        failures: Sequence[Failure],
    ) -> str | None:
        """Render `latents` (None: those in the output root) and publish, unless another has committed already (P1).

        Returns the id of this node where the video waits on its disk.
        """
        if self._publisher.is_committed(sample):
            return None
        if latents is None:
            latents, stages = self._publisher.stored(sample)
        with scratch_folder() as folder:
            with stopwatch() as decoding:
                media = self._publisher.write(sample, self._decoder.decode(latents), Path(folder))
            return self._publisher.publish(sample, media, decoding.seconds, stages, failures)

    @ray.method(concurrency_group="health", enable_task_events=False)  # a question a second is no news
    def progress(self) -> LifeSign:
        return LifeSign(self._publisher.count)
