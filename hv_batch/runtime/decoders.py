"""VAE-decoder actors: latents in, a committed video out. Frames never leave the actor that decoded them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import ray

from hv_batch.job import commits, layout
from hv_batch.job.errors import Failure
from hv_batch.job.latents import drop_latents, drop_steps, get_latents, sample_identity
from hv_batch.job.samples import Sample
from hv_batch.protocol import Decoder
from hv_batch.runtime.codecs import check_encoder
from hv_batch.runtime.context import RunContext, StageReport, see_output_root, stopwatch
from hv_batch.runtime.failures import DISK_FULL, LatentsGoneError, NodeError
from hv_batch.runtime.media import MediaInfo, write_media

SCRATCH = "hv_batch-"
SCRATCH_AGE_S = 6 * 3600.0  # older than any encoding: what is left by a process that was killed


def sweep_scratch(folder: Path) -> None:
    """Remove the temporary folders that killed decoders have left behind."""
    for path in folder.glob(f"{SCRATCH}*-*"):
        with suppress(OSError):  # another decoder of this node sweeps too
            if time.time() - path.stat().st_mtime > SCRATCH_AGE_S:
                shutil.rmtree(path)


@ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)
class DecoderActor:
    """Holds the VAE decoder; decodes, encodes to mp4, uploads and commits one sample at a time."""

    def __init__(self, context: RunContext, name: str) -> None:
        self._context = context
        self._name = name
        self._frames = 0

    def node_id(self) -> str:
        """Ray's id of the node it stands on; the first answer says that it does."""
        return ray.get_runtime_context().get_node_id()

    def load(self) -> None:
        """Not in __init__: an exception here keeps its type on the way to the driver."""
        see_output_root(self._context.store)
        sweep_scratch(Path(tempfile.gettempdir()))
        check_encoder(self._context.config.media)  # a node without ffmpeg is found here, not at its first sample
        self._decoder: Decoder = self._context.engine.decoder(self._context.config.parallel.device)

    def decode(
        self,
        sample: Sample,
        latents: np.ndarray | None,
        stages: Mapping[str, StageReport],
        failures: Sequence[Failure],
    ) -> bool:
        """Render `latents` (None: those in the output root) and commit; False when another had committed first (P1)."""
        context = self._context
        # An earlier try may have committed and died before it could say so; and while the output root does not answer,
        # a question finds out in place of a decode, which takes half a minute of a GPU.
        if context.store.exists(layout.commit_key(sample.shard, sample.key)):
            self._clear(sample)
            return False
        if latents is None:
            stored = get_latents(context.store, sample, sample_identity(sample, context.fingerprint))
            if stored is None:
                raise LatentsGoneError(f"no stored latents of sample {sample.key} that belong to this run")
            latents = stored.latents
            stages = {name: StageReport.from_dict(report) for name, report in stored.stages.items()}
        with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as folder:
            with stopwatch() as decoding:
                media = self._write(sample, latents, Path(folder))
            with stopwatch() as uploading:
                file = layout.media_key(sample.shard, sample.key, media.sha256, media.suffix)
                poster = self._put_poster(sample, media)
                context.store.put_file(file, media.path)
        details = {"upload_seconds": round(uploading.seconds, 3)}
        report = StageReport(decoding.seconds, ray.util.get_node_ip_address(), self._name, details)
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

    def _write(self, sample: Sample, latents: np.ndarray, folder: Path) -> MediaInfo:
        params, media = sample.params, self._context.config.media
        try:
            return write_media(
                self._counted(self._decoder.decode(latents)),
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

    def _counted(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            self._frames += len(chunk)
            yield chunk

    @ray.method(concurrency_group="health")
    def progress(self) -> int:
        return self._frames
