"""Tombstones: a sample with one was withdrawn for good (P1).

The tombstone is put if absent, before anything of the sample is removed, and is never removed. From then on the sample
is terminal: it is neither rendered nor committed nor quarantined, whatever else the root holds of it. All that is left
of it is a remnant: of a withdrawal that was killed, or of a worker that committed late. A worker looks for a tombstone
after it has put a commit record, so at least one of the two removes the record.

The paths of remnants follow from shard and key. Nothing that an object of the root says is removed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Set
from datetime import UTC, datetime
from typing import Any

from hv_batch import __version__
from hv_batch.job import layout
from hv_batch.job.documents.reading import read_record
from hv_batch.job.documents.schema import WithdrawnRecord
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.storage.store import Store

SCHEMA = "hv_batch/withdrawn/1"

_TOMBSTONE = re.compile(r"withdrawn/shard-(?P<shard>\d{5,12})/[^/]+\.json")


def tombstone(place: Mapping[str, Any], *, reason: str, sha256: str | None) -> dict[str, Any]:
    """The tombstone of a sample. `place` holds its key, id, row, video_index and shard; `sha256` is that of its media,
    None if it is not committed.
    """
    return {
        "schema": SCHEMA,
        **place,
        "reason": reason,
        "sha256": sha256,
        "withdrawn_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "version": __version__,
    }


def read_tombstone(store: Store, shard: int, key: str) -> dict[str, Any]:
    """Raises FileNotFoundError if there is none, and InvalidObjectError if it is damaged or that of another sample."""
    return read_record(store, layout.withdrawn_key(shard, key), WithdrawnRecord, shard, key)


def is_withdrawn(store: Store, shard: int, key: str) -> bool:
    """Whether the sample has a tombstone. One that is damaged counts: the sample must not be rendered again."""
    return store.exists(layout.withdrawn_key(shard, key))


def withdrawn_keys(store: Store, shard: int) -> frozenset[str]:
    """The keys of the samples of a shard that have a tombstone."""
    return layout.sample_keys(store.list(layout.withdrawn_dir(shard)))


def all_withdrawn(store: Store) -> Mapping[int, frozenset[str]]:
    """The keys of all samples that have a tombstone, by shard: one listing for the whole root."""
    found: dict[int, set[str]] = defaultdict(set)
    for path in store.list(layout.WITHDRAWN):
        match, key = _TOMBSTONE.fullmatch(path), layout.sample_key(path)
        if match and key:
            found[int(match["shard"])].add(key)
    return {shard: frozenset(keys) for shard, keys in found.items()}


def remnants(store: Store, shard: int, keys: Set[str]) -> dict[str, list[str]]:
    """The objects of the samples `keys` without their tombstones, by key, each in the order of its removal.

    Records come first: without its record, a file belongs to no sample.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for folder in (layout.commit_dir, layout.quarantine_dir, layout.retried_dir):
        _collect(found, keys, {path: layout.sample_key(path) for path in store.list(folder(shard))})
    for folder in (layout.media_dir, layout.poster_dir):
        _collect(found, keys, {path: layout.media_owner(path) for path in store.list(folder(shard))})
    for folder in (layout.latent_dir, layout.step_dir):
        _collect(found, keys, {path: layout.sample_key(path) for path in store.list(folder(shard))})
    return dict(found)


def delete_remnants(store: Store, shard: int, keys: Set[str]) -> list[str]:
    """Remove the remnants of samples. Returns their names. The shard must not be sealed with a row of one of them."""
    names = [name for of_sample in remnants(store, shard, keys).values() for name in of_sample]
    for name in names:
        store.delete(name)
    return names


def remove_withdrawn(store: Store, shard: int, keys: Set[str]) -> bool:
    """Remove the remnants of withdrawn samples. Returns whether the shard was unsealed before.

    It is unsealed if one has a commit record, because its seal may describe that sample.
    """
    has_commit = any(layout.commit_key(shard, key) in names for key, names in remnants(store, shard, keys).items())
    if has_commit:
        unseal_shard(store, shard)
    delete_remnants(store, shard, keys)
    return has_commit


def _collect(found: dict[str, list[str]], keys: Set[str], owners: Mapping[str, str | None]) -> None:
    for path, key in owners.items():
        if key in keys and key is not None:
            found[key].append(path)
