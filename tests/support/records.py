"""Commit and quarantine records of one sample."""

from __future__ import annotations

import dataclasses

from hv_batch.job import layout
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.commits import commit_record, quarantine_record
from hv_batch.sampling_params import SamplingParams

PARAMS = SamplingParams(
    prompt="A fox in the snow, 狐狸",
    negative_prompt="blur",
    height=64,
    width=96,
    num_frames=9,
    num_inference_steps=4,
    seed=7,
    guidance_scale=6.0,
    cfg_scale=1.0,
    guidance_rescale=0.0,
    flow_shift=7.0,
)


SAMPLE = Sample(
    key="fox.v1-v0", id="fox.v1", row=3, video_index=0, shard=17, params=PARAMS, fps=24, extra={"category": "animals"}
)


STAGES = {"encode": {"seconds": 0.5, "node": "n1"}, "denoise": {"seconds": 8.0, "node": "n2", "ulysses_degree": 2}}


def a_commit(sample: Sample = SAMPLE, sha256: str = "ab" * 32) -> dict:
    file = layout.media_key(sample.shard, sample.key, sha256, ".mp4")
    media = Rendered(sha256=sha256)
    return commit_record(
        sample, file=file, media=media, stages=STAGES, failures=FAILURES[:1], fingerprint="f" * 64, versions={"x": "1"}
    )


def a_quarantine(sample: Sample = SAMPLE) -> dict:
    return quarantine_record(sample, failures=FAILURES, fingerprint="f" * 64, versions={"x": "1"})


FAILURES = [
    Failure(FailureClass.INFRA, "lost node n3", where="denoise-0.0").to_dict(),
    Failure(FailureClass.POISON, "ValueError: not finite", "Traceback ...").to_dict(),
]


@dataclasses.dataclass(frozen=True)
class Rendered:
    bytes: int = 1234
    sha256: str = "ab" * 32
    frames_sha256: str = "cd" * 32
    num_frames: int = 9
    height: int = 64
    width: int = 96
