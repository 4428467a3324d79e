"""From decoded frames to a committed video, on the node that decodes it: whoever decodes publishes through this.

The order is that of P1: media under a name made of their hash, then the record, which is the commit; only then goes
what led there (latents, step checkpoint).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import ray

from hv_batch.job import commits, layout
from hv_batch.job.errors import Failure
from hv_batch.job.latents import drop_latents, drop_steps, get_latents, sample_identity
from hv_batch.job.samples import Sample
from hv_batch.runtime.codecs import check_encoder
from hv_batch.runtime.context import RunContext, StageReport, see_output_root, stopwatch
from hv_batch.runtime.failures import DISK_FULL, LatentsGoneError, NodeError
from hv_batch.runtime.media import MediaInfo, write_media

SCRATCH = "hv_batch-"
SCRATCH_AGE_S = 6 * 3600.0  # older than any encoding: what is left by a process that was killed

Stages = Mapping[str, StageReport]


def sweep_scratch(folder: Path) -> None:
    """Remove the temporary folders that killed decoders have left behind."""
    for path in folder.glob(f"{SCRATCH}*-*"):
        with suppress(OSError):  # another decoder of this node sweeps too
            if time.time() - path.stat().st_mtime > SCRATCH_AGE_S:
                shutil.rmtree(path)


class Publisher:
    """Of the worker `name`. `count` grows with every frame that was written."""

    def __init__(self, context: RunContext, name: str) -> None:
        self._context = context
        self._name = name
        self.count = 0

    def check(self) -> None:
        """Whether this node can publish; raises UserError where it does not see the output root or has no encoder."""
        see_output_root(self._context.store)
        sweep_scratch(Path(tempfile.gettempdir()))
        check_encoder(self._context.config.media)  # a node without ffmpeg is found here, not at its first sample

    def is_committed(self, sample: Sample) -> bool:
        """Asked before a decode: an earlier try may have committed and died before it could say so; and while the
        output root does not answer, a question finds out in place of a decode, which takes half a minute of a GPU.
        """
        found = self._context.store.exists(layout.commit_key(sample.shard, sample.key))
        if found:
            self._clear(sample)
        return found

    def stored(self, sample: Sample) -> tuple[np.ndarray, Stages]:
        """The final latents in the output root, and the reports of the stages behind them."""
        stored = get_latents(self._context.store, sample, sample_identity(sample, self._context.fingerprint))
        if stored is None:
            raise LatentsGoneError(f"no stored latents of sample {sample.key} that belong to this run")
        return stored.latents, {name: StageReport.from_dict(report) for name, report in stored.stages.items()}

    def write(self, sample: Sample, chunks: Iterable[np.ndarray], folder: Path) -> MediaInfo:
        params, media = sample.params, self._context.config.media
        try:
            return write_media(
                self._counted(chunks),
                folder / "media",
                height=params.height,
                width=params.width,
                num_frames=params.num_frames,
                fps=sample.fps,
                media=media,
            )
        except OSError as error:
            if error.errno in DISK_FULL:
                raise NodeError(f"no space for temporary files in {folder.parent}: {error}") from error
            raise

    def commit(
        self, sample: Sample, media: MediaInfo, seconds: float, stages: Stages, failures: Sequence[Failure]
    ) -> bool:
        """Upload and commit what took `seconds` to decode; False when another had committed first (P1)."""
        context = self._context
        with stopwatch() as uploading:
            file = layout.media_key(sample.shard, sample.key, media.sha256, media.suffix)
            poster = self._put_poster(sample, media)
            context.store.put_file(file, media.path)
        details = {"upload_seconds": round(uploading.seconds, 3)}
        report = StageReport(seconds, ray.util.get_node_ip_address(), self._name, details)
        record = commits.commit_record(
            sample,
            file=file,
            poster=poster,
            media=media,
            stages={name: report.to_dict() for name, report in {**stages, "decode": report}.items()},
            failures=[failure.to_dict() for failure in failures],
            fingerprint=context.fingerprint,
            versions=context.versions,
        )
        ours = commits.commit(context.store, record)
        self._clear(sample)
        return ours

    def _put_poster(self, sample: Sample, media: MediaInfo) -> str | None:
        """Its key in the output root; None where there is no poster."""
        if media.poster is None:
            return None
        key = layout.poster_key(sample.shard, sample.key, media.poster.sha256)
        self._context.store.put_file(key, media.poster.path)
        return key

    def _clear(self, sample: Sample) -> None:
        """Remove what nobody needs of a committed sample."""
        drop_steps(self._context.store, sample)
        if not self._context.config.output.keep_latents:
            drop_latents(self._context.store, sample)

    def _counted(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            self.count += len(chunk)
            yield chunk


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for one video, named so that `sweep_scratch` finds it."""
    return tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-")
