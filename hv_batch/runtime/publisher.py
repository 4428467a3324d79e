"""Writes decoded frames to media files and commits them. Decoder actors and rank 0 of a decoding group use it.

The order of the writes implements P1: the media under a name that contains their hash, then the record, which is the
commit. The latents and the step checkpoint are deleted last. While the output root does not answer, media and record
go to the spool on the node's disk.
"""

from __future__ import annotations

import errno
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
from hv_batch.job.hooks.hook import HookUnavailableError, parse_hook
from hv_batch.job.log_records import log_fields
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.quality import look
from hv_batch.job.records import commits
from hv_batch.job.records.latents import drop_intermediates, get_latents
from hv_batch.job.records.spool import Spool
from hv_batch.job.scheduling.limits import OUTAGE_PAUSE_S
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.media.encoder_check import check_encoder
from hv_batch.media.ffmpeg import FfmpegError
from hv_batch.media.sample_hook import check_sample_hook, run_sample_hook
from hv_batch.media.writer import MediaInfo, write_media
from hv_batch.runtime.classify import DISK_FULL, LatentsGoneError, NodeError
from hv_batch.runtime.run_context import PublishReport, RunContext, StageReport, see_output_root, stopwatch

logger = logging.getLogger(__name__)

DISK_FAULTS = DISK_FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
SCRATCH = "hv_batch-"
SCRATCH_AGE_S = 6 * 3600.0  # longer than any encode takes: an older folder belongs to a process that was killed

Stages = Mapping[str, StageReport]


def sweep_scratch(folder: Path) -> None:
    """Remove the temporary folders of killed decoders from `folder`."""
    for path in folder.glob(f"{SCRATCH}*-*"):
        with suppress(OSError):  # another decoder of this node may remove it at the same time
            if time.time() - path.stat().st_mtime > SCRATCH_AGE_S:
                shutil.rmtree(path)


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """A decoded video that is not committed yet."""

    sample: Sample
    media: MediaInfo
    seconds: float  # duration of its decode
    stages: Stages  # reports of the stages before the decode
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
        """The local paths of its files by their keys in the output root."""
        poster = {self.poster_file: self.media.poster.path} if self.media.poster and self.poster_file else {}
        return {self.file: self.media.path} | poster


class Publisher:
    """Publishes the videos of the worker `name`. `count` is the number of frames written so far."""

    def __init__(self, context: RunContext, name: str) -> None:
        self._context = context
        self._name = name
        self._spool = Spool(context.config.output, context.store, context.fingerprint)
        text = context.config.hooks.sample
        self._hook = parse_hook(text) if text else None
        self._away_until = 0.0  # monotonic time until which the output root is assumed unreachable
        self.count = 0

    def check(self) -> str:
        """Check that this node can publish, and remove leftovers of killed processes from its disk.

        Returns a warning if this node has no spool although the config asks for one, or an empty text. Raises
        UserError if the node does not see the output root, NodeError if its ffmpeg or its disk do not work.
        """
        see_output_root(self._context.store)
        sweep_scratch(Path(tempfile.gettempdir()))
        self._spool.remove_stale()
        with blaming_node():
            check_encoder(self._context.config.media)  # otherwise a node without ffmpeg would fail at its first sample
            if self._hook:
                check_sample_hook(self._hook, self._context.hooks["sample"])
        problem = self._spool.problem()
        return f"{problem} (node {ray.util.get_node_ip_address()})" if problem else ""

    def is_committed(self, sample: Sample) -> bool:
        """Whether the sample has a commit record. Called before a decode, because an earlier try may have committed the
        sample and died before it could report that.

        If the output root does not answer, returns False if the spool has room for the video. Otherwise raises
        StorageUnavailableError: a failed decode would waste half a minute of a GPU.
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
        """The final latents in the output root, [C, T, H, W], and the reports of the stages that made them.

        Raises LatentsGoneError if there are none of this run.
        """
        stored = get_latents(self._context.store, sample, *self._context.sample_identities(sample))
        if stored is None:
            raise LatentsGoneError(f"no stored latents of sample {sample.key} that belong to this run")
        return stored.latents, {name: StageReport.from_dict(report) for name, report in stored.stages.items()}

    def write(self, sample: Sample, chunks: Iterable[np.ndarray], folder: Path) -> MediaInfo:
        """Encode the frames, uint8 [F, H, W, 3] per chunk, to a media file in `folder`, named after the sample.

        Then the sample hook, if there is one, may change the file. Raises NodeError if ffmpeg, the hook or the disk of
        the node fails, and HookFailedError if the hook refuses the file.
        """
        params, media = sample.params, self._context.config.media
        with blaming_node():
            written = write_media(
                self._counted(chunks),
                folder / sample.key,
                height=params.height,
                width=params.width,
                num_frames=params.num_frames,
                fps=sample.fps,
                media=media,
            )
            if self._hook is None:
                return written
            timeout_s = self._context.config.hooks.sample_timeout_s
            return run_sample_hook(self._hook, written, commits.describe_sample(sample), timeout_s)

    def publish(self, made: Sequence[DecodedVideo]) -> list[PublishReport]:
        """Commit each video, unless the sample is already committed (P1).

        If the output root does not answer, the videos wait in the spool. Raises StorageUnavailableError if the spool
        has no room either.
        """
        try:
            if self._is_away():
                raise StorageUnavailableError("the output root did not answer to a recent request")
            with self._noting_outages():
                self._context.check_lease()
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
            self._log(made, "the output root does not answer, spooled on this node's disk")
            node = ray.get_runtime_context().get_node_id()
            return [PublishReport(node, _look(video)) for video in made]
        self._log(made, "committed")
        return [PublishReport(None, _look(video)) for video in made]

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
            scores=made.media.scores,
            licence=self._context.licence,
            hook=made.media.hook,
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


def _look(made: DecodedVideo) -> str:
    return look(made.media.scores, made.sample.params.num_frames) if made.media.scores else ""


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for the videos of a task. `sweep_scratch` recognizes its name.

    Raises NodeError if the disk of the node fails.
    """
    with blaming_node():
        return tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-")


@contextmanager
def blaming_node() -> Iterator[None]:
    """Raise NodeError for errors of ffmpeg, the hook and the local disk. The block may use local files only."""
    try:
        yield
    except (FfmpegError, HookUnavailableError) as error:
        raise NodeError(str(error)) from error
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        raise NodeError(f"temporary files in {tempfile.gettempdir()} cannot be written: {error}") from error
