"""A whole run in one thread: the real job package, without Ray and without a model.

It writes to the output root what the driver and its workers write, in the same order: scan, latents, media, record,
seal, summary, `_SUCCESS`. A sample's pixels depend on its seed alone (P3).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from hv_batch.job import layout
from hv_batch.job.config.sections import MediaConfig
from hv_batch.job.dataset import card
from hv_batch.job.dataset.lost_media import release_lost
from hv_batch.job.dataset.seal import read_committed, seal_shard
from hv_batch.job.inspection import summary
from hv_batch.job.manifest.index import Index
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records import commits, run_document
from hv_batch.job.records.continuation import equal_earlier
from hv_batch.job.records.latents import (
    FinalLatents,
    StoredLatents,
    drop_latents,
    get_latents,
    put_latents,
    sample_identity,
)
from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.records.shard_scan import Pending
from hv_batch.job.report.update import update_report
from hv_batch.job.stages import Stage
from hv_batch.job.storage import canonical_json
from hv_batch.job.storage.store import Store
from hv_batch.media.writer import write_media
from tests.support.rendered_roots import SCORES, RenderedMedia, make_failure, make_sample, open_root

COMPARED = ("data", "posters", "webdataset", "commits", "quarantine", "latents", "report/shards")
# Fields that hold the attempts from before a sample was released, and the totals over them.
TRIES = frozenset({"history", "attempts", "retries"})

WriteMedia = Callable[[Sample, np.ndarray, Path], tuple[Path, str, RenderedMedia]]


def some_samples(count: int = 6, **changes) -> list[Sample]:
    return [make_sample(number, **changes) for number in range(1, count + 1)]


class ListedShards:
    """The part of `Index` that PendingSamples uses, over a list of samples."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._shards: dict[int, list[Sample]] = {}
        for sample in samples:
            self._shards.setdefault(sample.shard, []).append(sample)
        self.shards = max(self._shards) + 1
        self.summary = SimpleNamespace(samples=len(samples), extra_kinds={})

    def size(self, shard: int) -> int:
        return len(self._shards.get(shard, ()))

    def samples(self, shard: int) -> list[Sample]:
        return self._shards.get(shard, [])

    def keys(self, shard: int) -> frozenset[str]:
        return frozenset(sample.key for sample in self.samples(shard))


def run_small(
    store: Store,
    samples: Sequence[Sample],
    *,
    poison: Collection[str] = (),
    denoised: Counter | None = None,
    media: WriteMedia | None = None,
    adorned: bool = False,
    index: Index | None = None,
) -> None:
    """One call of the run command. `denoised` counts denoises by key; the samples in `poison` are quarantined.

    `adorned` adds posters and tars. With `index`, the root has its run.json already, and the samples are those of the
    index.
    """
    if index is None:
        open_root(store, len(samples), adorned=adorned)
    if store.exists(layout.SUCCESS):
        return
    shards = index or ListedShards(samples)
    plan = PendingSamples(store, shards)
    run = run_document.read_run(store)
    facts = {"identity": run["identity"], "earlier": run.get("earlier", ())}
    counts = denoised if denoised is not None else Counter()
    for scan in plan.scanner.scans():
        plan.enter(scan)
        for found in scan.pending:
            if found.sample.key in poison:
                _give_up(store, run, found)
                plan.quarantined(found.sample)
            else:
                _render(store, run, found, counts, media or digest_media, adorned)
                plan.committed(found.sample)
        for complete in plan.take_complete():
            if adorned and release_lost(store, complete.shard, read_committed(store, complete.shard, complete.keys)):
                return  # the next call renders the samples again
            kinds = shards.summary.extra_kinds
            seal_shard(store, complete.shard, complete.keys, kinds, **facts, webdataset=adorned)
    totals = summary.aggregate(store)
    update_report(store, running=False)
    card.write_card(store, run_document.read_run(store), totals)
    run_document.finish_run(store, totals)


def _earlier(found: Pending) -> list[dict]:
    return [failure.to_dict() for failure in found.earlier]


def _give_up(store: Store, run: Mapping, found: Pending) -> None:
    sample = found.sample
    failures = [*_earlier(found), make_failure(message=f"latents of step {sample.row} are not finite")]
    record = commits.quarantine_record(sample, failures=failures, fingerprint=run["fingerprint"], versions={})
    commits.quarantine(store, record)
    drop_latents(store, sample.shard, sample.key)


def _render(store: Store, run: Mapping, found: Pending, denoised: Counter, media: WriteMedia, adorned: bool) -> None:
    sample = found.sample
    identity = sample_identity(sample, run["fingerprint"])
    earlier = [sample_identity(sample, each) for each in equal_earlier(run)]
    stored = get_latents(store, sample, identity, earlier) if found.stage is Stage.DECODE else None
    if stored is None:
        denoised[sample.key] += 1
        drawn = np.random.default_rng(sample.params.seed).standard_normal(sample.params.latent_shape)
        stored = StoredLatents(drawn.astype(np.float32), {"denoise": {"seconds": 1.25}})
        put_latents(store, [FinalLatents(sample, stored.latents, identity, stored.stages)])
    with tempfile.TemporaryDirectory() as folder:
        path, suffix, info = media(sample, stored.latents, Path(folder))
        file = layout.media_key(sample.shard, sample.key, info.sha256, suffix)
        poster = _put_poster(store, sample, info, Path(folder)) if adorned and suffix == ".mp4" else None
        store.put_file(file, path)
    record = commits.commit_record(
        sample,
        file=file,
        poster=poster,
        media=info,
        stages={**stored.stages, "decode": {"seconds": 0.5}},
        failures=_earlier(found),
        fingerprint=run["fingerprint"],
        versions={},
        scores=getattr(info, "scores", SCORES),
    )
    commits.commit(store, record)
    drop_latents(store, sample.shard, sample.key)


def _put_poster(store: Store, sample: Sample, info: RenderedMedia, folder: Path) -> str:
    """The poster that comes with the media, or else one that is not an image; its bytes depend on the frames."""
    path = folder / "poster.jpg"
    if made := getattr(info, "poster", None):
        path = made.path
    else:
        path.write_bytes(info.frames_sha256.encode())
    key = layout.poster_key(sample.shard, sample.key, hashlib.sha256(path.read_bytes()).hexdigest())
    store.put_file(key, path)
    return key


def digest_media(sample: Sample, latents: np.ndarray, folder: Path) -> tuple[Path, str, RenderedMedia]:
    """A media file that is not a video; its bytes depend on the latents. It costs no time."""
    data = hashlib.sha256(latents.tobytes()).digest() * 8
    path = folder / "media.mp4"
    path.write_bytes(data)
    params, digest = sample.params, hashlib.sha256(data).hexdigest()
    return path, ".mp4", RenderedMedia(len(data), digest, digest[::-1], params.num_frames, params.height, params.width)


def real_media(
    sample: Sample, latents: np.ndarray, folder: Path, crf: int = 30, poster: bool = False
) -> tuple[Path, str, RenderedMedia]:
    """A real video or image, encoded by ffmpeg."""
    params = sample.params
    levels = (127 + 40 * np.tanh(latents.mean(axis=(0, 2, 3)) * 10)).astype(np.uint8)
    shape = (params.height, params.width, 3)
    frames = (np.full((1 if i == 0 else 4, *shape), level, np.uint8) for i, level in enumerate(levels))
    info = write_media(
        frames,
        folder / "media",
        height=params.height,
        width=params.width,
        num_frames=params.num_frames,
        fps=sample.fps,
        media=MediaConfig(crf=crf, preset="ultrafast", threads=1, poster=poster),
    )
    return info.path, info.suffix, info


def everything(store: Store, *, ignoring: Collection[str] = ()) -> dict[str, bytes | dict]:
    """The objects of a root that P2 and P3 cover: media, tables and summary byte for byte, records without their dates.

    `ignoring` are further fields of records, totals and summary to leave out.
    """
    found: dict[str, bytes | dict] = {}
    unlike = {"created_at", *ignoring}
    keys = [key for folder in COMPARED for key in store.list(folder)] + [layout.SUMMARY, layout.SUCCESS]
    for key in keys:
        data = store.get(key) if store.exists(key) else b"(absent)"
        found[key] = data
        if key.endswith(".json") and data != b"(absent)" and (ignoring or key != layout.SUMMARY):
            found[key] = {name: value for name, value in canonical_json.decode(data).items() if name not in unlike}
    return found
