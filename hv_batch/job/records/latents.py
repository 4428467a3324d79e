"""Intermediate results of uncommitted samples: final latents, and step checkpoints of unfinished denoises (P4).

Each is one safetensors file whose metadata holds the sample's identity and a digest. A file with another identity, a
damaged file and a missing file are treated alike: the sample is rendered again. A wrong latent is never decoded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hv_batch.job import layout
from hv_batch.job.documents.reading import parse
from hv_batch.job.documents.schema import StoredStages, TensorHeader
from hv_batch.job.storage.canonical_json import encode_line
from hv_batch.protocol import MAX_HISTORY, StepState

if TYPE_CHECKING:
    from hv_batch.job.manifest.samples import Sample
    from hv_batch.job.storage.store import Store

LATENTS_SCHEMA = "hv_batch/latents/1"
STEPS_SCHEMA = "hv_batch/steps/1"  # the latents alone
STEPS_SCHEMA_2 = "hv_batch/steps/2"  # with the arrays of `StepState.history`, which earlier versions do not read
HISTORY_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

# Errors that may be raised when a file is read that this module has not written.
INVALID_FILE_ERRORS = (SafetensorError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, slots=True)
class StoredLatents:
    latents: np.ndarray  # float32 [C, T, h, w]
    stages: Mapping[str, Mapping[str, Any]]  # the reports of the upstream stages


def sample_identity(sample: Sample, fingerprint: str) -> str:
    """Hex digest of everything a latent depends on: the sample's parameters and the run's fingerprint."""
    return hashlib.sha256(encode_line({"params": sample.params.to_dict(), "fingerprint": fingerprint})).hexdigest()


@dataclass(frozen=True, slots=True)
class FinalLatents:
    """The final latents of one sample, to be stored."""

    sample: Sample
    latents: np.ndarray  # [C, T, h, w], any float dtype
    identity: str
    stages: Mapping[str, Mapping[str, Any]]  # the reports of the upstream stages


def put_latents(store: Store, denoised: Sequence[FinalLatents]) -> None:
    """Store final latents as float32. A later failure then never repeats the denoise (P4).

    Raises ValueError if their shape is not `latent_shape` of the sample's parameters.
    """
    objects = {}
    for each in denoised:
        tensor = _checked(each.sample, each.latents)
        metadata = {
            "schema": LATENTS_SCHEMA,
            "identity": each.identity,
            "sha256": _digest(tensor),
            "stages": json.dumps(each.stages),
        }
        objects[layout.latent_key(each.sample.shard, each.sample.key)] = save({"latents": tensor}, metadata=metadata)
    store.put_all(objects)


def get_latents(store: Store, sample: Sample, identity: str, earlier: Collection[str] = ()) -> StoredLatents | None:
    """The latents that `put_latents` stored with this identity, or one of `earlier`; None if there are no valid ones.

    Raises the store's own errors.
    """
    data = _get(store, layout.latent_key(sample.shard, sample.key))
    try:
        tensor, metadata = _open(data)
        is_ours = metadata["schema"] == LATENTS_SCHEMA and metadata["identity"] in (identity, *earlier)
        is_whole = tensor.shape == sample.params.latent_shape and metadata["sha256"] == _digest(tensor)
        stages = parse(StoredStages, metadata["stages"].encode())
    except INVALID_FILE_ERRORS:
        return None
    return StoredLatents(tensor, stages) if is_ours and is_whole else None


def drop_latents(store: Store, shard: int, key: str) -> None:
    store.delete(layout.latent_key(shard, key))


def put_steps(store: Store, sample: Sample, state: StepState, identity: str) -> None:
    """Store a step checkpoint, which replaces the previous one.

    Raises ValueError if the shape of an array is not `latent_shape` of the sample's parameters.
    """
    tensors = {name: _checked(sample, array) for name, array in {**state.history, "latents": state.latents}.items()}
    metadata = {
        "schema": STEPS_SCHEMA_2 if state.history else STEPS_SCHEMA,
        "identity": identity,
        "step": str(state.step),
        "sha256": _steps_digest(tensors, state.step),
    }
    store.put(layout.step_key(sample.shard, sample.key), save(tensors, metadata=metadata))


def get_steps(store: Store, sample: Sample, identity: str, earlier: Collection[str] = ()) -> StepState | None:
    """The last step checkpoint with this identity, or one of `earlier`; None if there is no valid one.

    Raises the store's own errors.
    """
    data = _get(store, layout.step_key(sample.shard, sample.key))
    try:
        tensors, metadata = _open_all(data)
        step = int(metadata["step"])
        latents = tensors.pop("latents")
        schema = STEPS_SCHEMA_2 if tensors else STEPS_SCHEMA
        is_ours = metadata["schema"] == schema and metadata["identity"] in (identity, *earlier)
        is_valid = len(tensors) <= MAX_HISTORY and all(map(HISTORY_NAME.fullmatch, tensors))
        is_valid &= all(_is_latent(sample, array) for array in (latents, *tensors.values()))
        is_whole = is_valid and metadata["sha256"] == _steps_digest({**tensors, "latents": latents}, step)
        is_between = 0 < step < sample.params.num_inference_steps
    except INVALID_FILE_ERRORS:
        return None
    return StepState(step, latents, tensors) if is_ours and is_whole and is_between else None


def _is_latent(sample: Sample, array: np.ndarray) -> bool:
    """Whether an array from storage can be one of a denoise of this sample."""
    is_latent = array.dtype == np.float32 and array.shape == sample.params.latent_shape
    return is_latent and bool(np.isfinite(array).all())


def drop_steps(store: Store, shard: int, key: str) -> None:
    """Remove the step checkpoint if there is one. Most samples never have one."""
    name = layout.step_key(shard, key)
    if store.exists(name):  # on a versioned bucket, every delete of an absent object adds a delete marker
        store.delete(name)


def drop_intermediates(store: Store, shard: int, key: str, *, keep_latents: bool) -> None:
    """Remove the step checkpoint of a committed sample, and its latents unless `keep_latents`."""
    drop_steps(store, shard, key)
    if not keep_latents:
        drop_latents(store, shard, key)


def checkpointed(store: Store) -> frozenset[str]:
    """The keys of all samples with a step checkpoint. They are few: only a drain or a crash interrupts a denoise."""
    return layout.sample_keys(store.list(layout.STEPS))


def _checked(sample: Sample, latents: np.ndarray) -> np.ndarray:
    if latents.shape != sample.params.latent_shape:
        raise ValueError(
            f"The latents of sample {sample.key} have the shape {latents.shape}; expected: {sample.params.latent_shape}"
        )
    return np.ascontiguousarray(latents, dtype=np.float32)


def _get(store: Store, key: str) -> bytes:
    try:
        return store.get(key)
    except FileNotFoundError:
        return b""  # `_open` rejects it


def _open(data: bytes) -> tuple[np.ndarray, dict[str, str]]:
    """The latents of a file and its metadata. Raises one of INVALID_FILE_ERRORS if `data` is not such a file."""
    tensors, metadata = _open_all(data)
    return tensors["latents"], metadata


def _open_all(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file by name, and its metadata. Raises as `_open`."""
    header_bytes = int.from_bytes(data[:8], "little")
    metadata = parse(TensorHeader, data[8 : 8 + header_bytes])["__metadata__"]
    return load(data), metadata


def _digest(tensor: np.ndarray) -> str:
    """Hex digest of the values."""
    return hashlib.sha256(tensor.tobytes()).hexdigest()


def _steps_digest(tensors: Mapping[str, np.ndarray], step: int) -> str:
    """Hex digest of the latents, of the other arrays with their names, and of the step, because an altered step number
    would give a wrong video.
    """
    digest = hashlib.sha256(tensors["latents"].tobytes())
    for name in sorted(tensors.keys() - {"latents"}):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].tobytes())
    digest.update(str(step).encode())
    return digest.hexdigest()
