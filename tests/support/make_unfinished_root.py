"""Writes the fixture root of an unfinished run: `python -m tests.support.make_unfinished_root FOLDER`.

It holds what a run removes before its end: the choices of the engine, step checkpoints and final latents. A change of
one of these formats adds a root.
"""

from __future__ import annotations

import sys

import numpy as np

from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.choices import record_choices
from hv_batch.job.records.latents import FinalLatents, put_latents, put_steps, sample_identity
from hv_batch.job.storage.store import Store
from hv_batch.protocol import StepState
from tests.support.rendered_roots import FINGERPRINT, make_sample

CHOICES = {"attention": "cudnn"}
PLAIN, CACHED, DENOISED = (make_sample(number, height=16, width=16, num_frames=5) for number in (1, 2, 3))
STAGES = {"encode": {"seconds": 0.5}, "denoise": {"seconds": 10.0}}


def array(sample: Sample, first: int) -> np.ndarray:
    """Different finite values that no library draws: float32, shaped as the latents of the sample."""
    shape = sample.params.latent_shape
    return (first + np.arange(np.prod(shape), dtype=np.float32) / 7).reshape(shape)


def states() -> dict[str, tuple[Sample, StepState]]:
    """The step checkpoints, by sample key: without and with the velocities of a step cache."""
    history = {"velocity_0": array(CACHED, 3), "velocity_1": array(CACHED, 4)}
    plain, cached = StepState(2, array(PLAIN, 1)), StepState(5, array(CACHED, 2), history)
    return {PLAIN.key: (PLAIN, plain), CACHED.key: (CACHED, cached)}


def make_root(target: str) -> None:
    """Write the root into the folder `target`."""
    store = Store(target)
    record_choices(store, CHOICES, worker="denoise-0.0", node="node-1")
    for sample, state in states().values():
        put_steps(store, sample, state, sample_identity(sample, FINGERPRINT))
    put_latents(store, [FinalLatents(DENOISED, array(DENOISED, 5), sample_identity(DENOISED, FINGERPRINT), STAGES)])


if __name__ == "__main__":
    make_root(sys.argv[1])
