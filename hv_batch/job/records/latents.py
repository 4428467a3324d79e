"""What a sample has reached before it is committed: its final latents, or the latents between two steps (P4).

Both are one safetensors file that says whose it is. A file of another identity, a damaged one and a missing one all
mean the same, that there is nothing to go on from: the sample is rendered again, and never wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hv_batch.job import layout
from hv_batch.job.storage.canonical_json import encode_line
from hv_batch.protocol import StepState

if TYPE_CHECKING:
    from hv_batch.job.manifest.samples import Sample
    from hv_batch.job.storage.store import Store

LATENTS_SCHEMA = "hv_batch/latents/1"
STEPS_SCHEMA = "hv_batch/steps/1"

NOT_OURS = (SafetensorError, ValueError, KeyError, TypeError)  # what reading anything else than our own file may raise


@dataclass(frozen=True, slots=True)
class StoredLatents:
    latents: np.ndarray  # float32 [C, T, h, w]
    stages: Mapping[str, Mapping[str, Any]]  # the reports of the stages behind them


def sample_identity(sample: Sample, fingerprint: str) -> str:
    """What a latent depends on: the sample's own parameters and the run it belongs to. Hex digest."""
    return hashlib.sha256(encode_line({"params": sample.params.to_dict(), "fingerprint": fingerprint})).hexdigest()


@dataclass(frozen=True, slots=True)
class FinalLatents:
    """What is to be kept of one sample."""

    sample: Sample
    latents: np.ndarray  # [C, T, h, w]
    identity: str
    stages: Mapping[str, Mapping[str, Any]]  # the reports of the stages behind them


def put_latents(store: Store, denoised: Sequence[FinalLatents]) -> None:
    """Keep final latents, as float32, so that a failure from here on never repeats the denoise (P4).

    Raises ValueError when their shape is not the sample's.
    """
    objects = {}
    for each in denoised:
        tensor = _checked(each.sample, each.latents)
        facts = {
            "schema": LATENTS_SCHEMA,
            "identity": each.identity,
            "sha256": _digest(tensor),
            "stages": json.dumps(each.stages),
        }
        objects[layout.latent_key(each.sample.shard, each.sample.key)] = save({"latents": tensor}, metadata=facts)
    store.put_all(objects)


def get_latents(store: Store, sample: Sample, identity: str) -> StoredLatents | None:
    """What `put_latents` kept under this identity; None when there is nothing to trust.

    An error of the store itself is raised, because then nothing is known.
    """
    data = _get(store, layout.latent_key(sample.shard, sample.key))
    try:
        tensor, facts = _open(data)
        is_ours = facts["schema"] == LATENTS_SCHEMA and facts["identity"] == identity
        is_whole = tensor.shape == sample.params.latent_shape and facts["sha256"] == _digest(tensor)
        stages = json.loads(facts["stages"])
    except NOT_OURS:
        return None
    return StoredLatents(tensor, stages) if is_ours and is_whole else None


def drop_latents(store: Store, shard: int, key: str) -> None:
    store.delete(layout.latent_key(shard, key))


def put_steps(store: Store, sample: Sample, state: StepState, identity: str) -> None:
    """Keep a step checkpoint, in the place of the one before.

    Raises ValueError when its latents' shape is not the sample's.
    """
    tensor = _checked(sample, state.latents)
    facts = {
        "schema": STEPS_SCHEMA,
        "identity": identity,
        "step": str(state.step),
        "sha256": _digest(tensor, state.step),
    }
    store.put(layout.step_key(sample.shard, sample.key), save({"latents": tensor}, metadata=facts))


def get_steps(store: Store, sample: Sample, identity: str) -> StepState | None:
    """The last step checkpoint of this identity; None when there is none to trust. Raises the store's own errors."""
    data = _get(store, layout.step_key(sample.shard, sample.key))
    try:
        tensor, facts = _open(data)
        step = int(facts["step"])
        is_ours = facts["schema"] == STEPS_SCHEMA and facts["identity"] == identity
        is_whole = tensor.shape == sample.params.latent_shape and facts["sha256"] == _digest(tensor, step)
        is_between = 0 < step < sample.params.num_inference_steps
    except NOT_OURS:
        return None
    return StepState(step, tensor) if is_ours and is_whole and is_between else None


def drop_steps(store: Store, shard: int, key: str) -> None:
    """Remove the step checkpoint, if there is one: most samples never have any."""
    name = layout.step_key(shard, key)
    if store.exists(name):  # looking first spares versioned buckets a delete marker for every sample
        store.delete(name)


def drop_intermediates(store: Store, shard: int, key: str, *, keep_latents: bool) -> None:
    """Remove what nobody needs of a committed sample."""
    drop_steps(store, shard, key)
    if not keep_latents:
        drop_latents(store, shard, key)


def checkpointed(store: Store) -> frozenset[str]:
    """The keys of all samples with a step checkpoint: of those that a drain or a crash cut short, so they are few."""
    return layout.sample_keys(store.list(layout.STEPS))


def _checked(sample: Sample, latents: np.ndarray) -> np.ndarray:
    if latents.shape != sample.params.latent_shape:
        raise ValueError(f"latents of {sample.key} are {latents.shape}, not {sample.params.latent_shape}")
    return np.ascontiguousarray(latents, dtype=np.float32)


def _get(store: Store, key: str) -> bytes:
    try:
        return store.get(key)
    except FileNotFoundError:
        return b""  # which is no file of ours either


def _open(data: bytes) -> tuple[np.ndarray, dict[str, str]]:
    """The tensor of a file and what it says of itself. Raises one of NOT_OURS when it is no such file."""
    header_bytes = int.from_bytes(data[:8], "little")
    facts = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    return load(data)["latents"], facts


def _digest(tensor: np.ndarray, step: int | None = None) -> str:
    """Of the values, and of the step they belong to: a step that was altered would give a wrong video."""
    digest = hashlib.sha256(tensor.tobytes())
    if step is not None:
        digest.update(str(step).encode())
    return digest.hexdigest()
