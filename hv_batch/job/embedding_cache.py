"""Prompt embeddings that outlive a run: a folder, here or in an object store, that any number of runs share.

    ab/ab12…ef.safetensors      the arrays of one embedding

A name is the digest of everything that the embedding's bits depend on: the prompt, its template, and what the engine
says of its text encoder. So an entry never becomes stale, and whoever writes it writes the same bits; put-if-absent
spares the second upload.

A cache saves work and must never cost any. A damaged entry is removed and encoded anew. When the store fails, whatever
the reason, it is left alone for a while, and prompts are encoded meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hv_batch.job.commits import encode
from hv_batch.job.storage import Store

SCHEMA = "hv_batch/embedding/1"
REST_S = 120.0  # after a failure; a store that does not answer takes about 15 s to say so, a prompt 0.1 s to encode


class EmbeddingCache:
    """`identity` is the engine's `text_identity`; `clock` tells seconds."""

    def __init__(self, store: Store, identity: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._identity = identity
        self._clock = clock
        self._rests_until = 0.0

    def get(self, prompt: str, *, image: bool) -> Mapping[str, np.ndarray] | None:
        """The arrays that were put for this prompt, bit for bit; None when there are none to be had."""
        if self._clock() < self._rests_until:
            return None
        key = self._key(prompt, image)
        try:
            data = self._store.get(key)
        except FileNotFoundError:
            return None
        except OSError:
            self._rests_until = self._clock() + REST_S
            return None
        arrays = _open(data)
        if arrays is None:
            with suppress(OSError):
                self._store.delete(key)
        return arrays

    def put(self, prompt: str, *, image: bool, arrays: Mapping[str, np.ndarray]) -> None:
        if self._clock() < self._rests_until:
            return
        facts = {"schema": SCHEMA, "sha256": _digest(arrays)}
        try:
            self._store.put_new(self._key(prompt, image), save(dict(arrays), metadata=facts))
        except OSError:
            self._rests_until = self._clock() + REST_S

    def _key(self, prompt: str, image: bool) -> str:
        facts = {"prompt": prompt, "image": image, "encoder": self._identity}
        name = hashlib.sha256(encode(facts)).hexdigest()
        return f"{name[:2]}/{name}.safetensors"


def _open(data: bytes) -> Mapping[str, np.ndarray] | None:
    """The arrays of an entry; None when it is damaged."""
    try:
        header_bytes = int.from_bytes(data[:8], "little")
        facts = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
        arrays: dict[str, np.ndarray] = load(data)
        is_whole = facts["schema"] == SCHEMA and facts["sha256"] == _digest(arrays)
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return arrays if is_whole else None


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
