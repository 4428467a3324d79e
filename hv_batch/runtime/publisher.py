"""From decoded frames to a committed video, on the node that decodes it: whoever decodes publishes through this.

The order is that of P1: media under a name made of their hash, then the record, which is the commit; only then goes
what led there (latents, step checkpoint). While the output root does not answer, all of it goes to the node's spool.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from hv_batch.job import layout
from hv_batch.job.failure import Failure
from hv_batch.job.log_records import log_fields
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records import commits
from hv_batch.job.records.latents import drop_intermediates, get_latents, sample_identity
from hv_batch.job.records.spool import Spool
from hv_batch.job.scheduling.limits import OUTAGE_PAUSE_S
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.media.codecs import check_encoder
from hv_batch.media.writer import MediaInfo, write_media
from hv_batch.runtime.classify import DISK_FULL, LatentsGoneError, NodeError
from hv_batch.runtime.run_context import RunContext, StageReport, see_output_root, stopwatch

logger = logging.getLogger(__name__)

SCRATCH = "hv_batch-"
SCRATCH_AGE_S = 6 * 3600.0  # older than any encoding: what is left by a process that was killed

Stages = Mapping[str, StageReport]


def sweep_scratch(folder: Path) -> None:
    """Remove the temporary folders that killed decoders have left behind."""
    for path in folder.glob(f"{SCRATCH}*-*"):
        with suppress(OSError):  # another decoder of this node sweeps too
            if time.time() - path.stat().st_mtime > SCRATCH_AGE_S:
                shutil.rmtree(path)


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """A video that is to be committed."""

    sample: Sample
    media: MediaInfo
    seconds: float  # that its decode took
    stages: Stages  # behind it
    failures: Sequence[Failure]

    @property
    def file(self) -> str:
        """Its key in the output root."""
        return layout.media_key(self.sample.shard, self.sample.key, self.media.sha256, self.media.suffix)

    @property
    def poster_file(self) -> str | None:
        poster = self.media.poster
        return layout.poster_key(self.sample.shard, self.sample.key, poster.sha256) if poster else None

    @property
    def files(self) -> dict[str, Path]:
        """All that belong to it, by their keys."""
        poster = {self.poster_file: self.media.poster.path} if self.media.poster and self.poster_file else {}
        return {self.file: self.media.path} | poster


class Publisher:
    """Of the worker `name`. `count` grows with every frame that was written."""

    def __init__(self, context: RunContext, name: str) -> None:
        self._context = context
        self._name = name
        self._spool = Spool(context.config.output, context.store, context.fingerprint)
        self._away_until = 0.0  # on the monotonic clock: the output root has not answered, and is not asked before
        self.count = 0

    def check(self) -> None:
        """Whether this node can publish; raises UserError where it does not see the output root or has no encoder."""
        see_output_root(self._context.store)
        sweep_scratch(Path(tempfile.gettempdir()))
        self._spool.remove_stale()
        check_encoder(self._context.config.media)  # a node without ffmpeg is found here, not at its first sample

    def is_committed(self, sample: Sample) -> bool:
        """Asked before a decode: an earlier try may have committed and died before it could say so.

        While the output root does not answer, nobody knows; then False where the video could wait in the spool, else
        StorageUnavailableError: a question finds out in place of a decode, which takes half a minute of a GPU.
        """
        has_room = partial(self._spool.has_room, sample.params.latent_bytes)
        if self._is_away() and has_room():
            return False
        try:
            with self._noting_outages():
                found = self._context.store.exists(layout.commit_key(sample.shard, sample.key))
        except StorageUnavailableError:
            if has_room():
                return False
            raise
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
        """The video in a file of `folder`, named after the sample."""
        params, media = sample.params, self._context.config.media
        try:
            return write_media(
                self._counted(chunks),
                folder / sample.key,
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

    def publish(self, made: Sequence[DecodedVideo]) -> list[str | None]:
        """Commit each of what was decoded, unless another has (P1).

        The answers are None, or the id of this node where the output root did not answer and the video waits in the
        spool. Raises StorageUnavailableError where there is no room for it either.
        """
        try:
            if self._is_away():
                raise StorageUnavailableError("the output root did not answer a moment ago")
            with self._noting_outages():
                with stopwatch() as uploading:
                    self._context.store.put_finished({name: path for one in made for name, path in one.files.items()})
                seconds = round(uploading.seconds / max(1, len(made)), 3)
                commits.commit_all(
                    self._context.store, [self._record(one, {"upload_seconds": seconds}) for one in made]
                )
                self._context.store.each(self._clear, [one.sample for one in made])
        except StorageUnavailableError:
            if not all([self._spool.add(self._record(one, {"spooled": True}), one.files) for one in made]):
                raise
            self._log(made, "the output root does not answer; kept on this node's disk")
            return [ray.get_runtime_context().get_node_id()] * len(made)
        self._log(made, "committed")
        return [None] * len(made)

    def _log(self, made: Sequence[DecodedVideo], what: str) -> None:
        for video in made:
            with log_fields(sample=video.sample.key, attempt=len(video.failures) + 1):
                logger.info(f"decoded in {video.seconds:.1f} s; {what}: {video.file}")

    def _record(self, made: DecodedVideo, details: Mapping[str, Any]) -> dict[str, Any]:
        report = StageReport(made.seconds, ray.util.get_node_ip_address(), self._name, details)
        return commits.commit_record(
            made.sample,
            file=made.file,
            poster=made.poster_file,
            media=made.media,
            stages={name: stage.to_dict() for name, stage in {**made.stages, "decode": report}.items()},
            failures=[failure.to_dict() for failure in made.failures],
            fingerprint=self._context.fingerprint,
            versions=self._context.versions,
        )

    def _is_away(self) -> bool:
        return time.monotonic() < self._away_until

    @contextmanager
    def _noting_outages(self) -> Iterator[None]:
        try:
            yield
        except StorageUnavailableError:
            self._away_until = time.monotonic() + OUTAGE_PAUSE_S
            raise

    def _clear(self, sample: Sample) -> None:
        keep_latents = self._context.config.output.keep_latents
        drop_intermediates(self._context.store, sample.shard, sample.key, keep_latents=keep_latents)

    def _counted(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            self.count += len(chunk)
            yield chunk


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the videos of a task, named so that `sweep_scratch` finds it."""
    return tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-")
