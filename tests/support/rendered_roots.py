"""Output roots as a run writes them, with real records but without rendering."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from hv_batch.job import layout
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records import commits, run_document
from hv_batch.job.records.run_identity import REVISION
from hv_batch.job.storage.store import Store
from hv_batch.sampling_params import SamplingParams

SHARD_SIZE = 4
FINGERPRINT = "f" * 64
SCORES = {"luma_mean": 101.5, "luma_spread": 40.25, "clipped_share": 0.0, "still_share": 0.125, "motion_energy": 7.0}
BLACK = {"luma_mean": 2.5, "luma_spread": 0.5, "clipped_share": 1.0, "still_share": 1.0, "motion_energy": 0.0}
STILL = SCORES | {"still_share": 1.0, "motion_energy": 0.25}


def make_sample(number: int, *, extra: dict[str, Any] | None = None, **changes: Any) -> Sample:
    """The sample of row `number`, from 1; `changes` are fields of its parameters."""
    params = {
        "prompt": f"a heron at dawn, take {number}",
        "negative_prompt": "blurred",
        "height": 128,
        "width": 96,
        "num_frames": 17,
        "num_inference_steps": 8,
        "seed": 1000 + number,
        "guidance_scale": 6.0,
        "cfg_scale": 1.0,
        "guidance_rescale": 0.0,
        "flow_shift": 7.0,
    }
    return Sample(
        key=f"s{number:03d}",
        id=f"s{number:03d}",
        row=number,
        video_index=0,
        shard=(number - 1) // SHARD_SIZE,
        params=SamplingParams(**params | changes),
        fps=24,
        extra=extra or {},
    )


@dataclass(frozen=True, slots=True)
class RenderedMedia:
    bytes: int
    sha256: str
    frames_sha256: str
    num_frames: int
    height: int
    width: int


def make_failure(kind: FailureClass = FailureClass.POISON, message: str = "not finite", traceback: str = "Traceback"):
    return Failure(kind, message, traceback, where="node-1").to_dict()


def make_commit(sample: Sample, **changes: Any) -> dict[str, Any]:
    """Its commit record, whose media facts are derived from the sample alone, as in a real run (P3)."""
    sha256 = hashlib.sha256(sample.key.encode()).hexdigest()
    params = sample.params
    media = RenderedMedia(1000, sha256, sha256[::-1], params.num_frames, params.height, params.width)
    reports = {"encode": {"seconds": 0.5}, "denoise": {"seconds": 10.0}, "decode": {"seconds": 2.0, "node": "node-1"}}
    facts: dict[str, Any] = {
        "file": layout.media_key(sample.shard, sample.key, sha256, ".png" if params.is_image else ".mp4"),
        "media": media,
        "stages": reports,
        "failures": [],
        "fingerprint": FINGERPRINT,
        "versions": {"torch": "2"},
        "scores": SCORES,
    }
    return commits.commit_record(sample, **facts | changes)


def make_quarantine(sample: Sample, *failures: dict[str, Any]) -> dict[str, Any]:
    tries = failures or (make_failure(), make_failure())
    return commits.quarantine_record(sample, failures=tries, fingerprint=FINGERPRINT, versions={})


def open_root(store: Store, samples: int, *, device: str = "cpu", adorned: bool = False) -> None:
    """A run of `count` samples in shards of SHARD_SIZE, with groups of 2 x 1 ranks; `adorned` adds posters and tars."""
    config = {
        "seed": 0,
        "model": {"engine": "hv_batch.engine.hunyuan:HunyuanVideo"},
        "parallel": {"device": device, "ulysses_degree": 2, "ring_degree": 1},
        "output": {"shard_size": SHARD_SIZE, "webdataset": adorned},
        "media": {"poster": adorned},
    }
    manifest = {
        "url": "/nights/<b>prompts</b>.jsonl",
        "rows": samples,
        "samples": samples,
        "shards": -(-samples // SHARD_SIZE),
    }
    identity = {"revision": REVISION, "seed": 0, "parallel": config["parallel"]}
    run_document.open_run(store, {"identity": identity, "config": config, "manifest": manifest, "versions": {}})
