"""The state of one shard, from listings: which samples have which record, and whether the shard has changed.

No record is read. A report compares `ShardListing.state` with that of its last digest of the shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from hv_batch.job import layout
from hv_batch.job.records.withdrawn import withdrawn_keys
from hv_batch.job.storage.store import Store

VERSION = 1  # of what parts and digests contain: another version writes all of them again


@dataclass(frozen=True, slots=True)
class ShardListing:
    """The keys of the samples of a shard by state, as `records.commits.ShardState`, and what identifies it."""

    shard: int
    committed: frozenset[str]
    quarantined: frozenset[str]
    withdrawn: frozenset[str]
    is_sealed: bool
    state: str  # hex

    @property
    def terminal(self) -> frozenset[str]:
        return self.committed | self.quarantined | self.withdrawn


def list_shard(
    store: Store, shard: int, keys: frozenset[str] | None, samples: int, withdrawn: frozenset[str] | None = None
) -> ShardListing:
    """List one shard. `keys` are those of its samples if they are known; records of other keys are then left out.

    `samples` is the number of samples of the shard. `withdrawn` saves a request if it is known.

    The state covers the names and sizes of the records and the time of the seal: records are immutable, and a shard is
    unsealed before one of them is replaced.
    """
    committed, quarantined = (  # sizes by key
        {key: size for name, size in store.list_sizes(folder).items() if (key := layout.sample_key(name))}
        for folder in (layout.commit_dir(shard), layout.quarantine_dir(shard))
    )
    try:
        sealed_at = store.modified(layout.metadata_key(shard))
    except (FileNotFoundError, NotADirectoryError):
        sealed_at = 0.0
    if withdrawn is None:
        withdrawn = withdrawn_keys(store, shard)

    def of_samples(found: Iterable[str]) -> frozenset[str]:
        return frozenset(found) if keys is None else keys.intersection(found)

    good, bad, gone = of_samples(committed), of_samples(quarantined), of_samples(withdrawn)
    facts = (
        VERSION,
        shard,
        samples,
        sealed_at,
        sorted((key, committed[key]) for key in good),
        sorted((key, quarantined[key]) for key in bad),
        sorted(gone),
    )
    state = hashlib.sha256(repr(facts).encode()).hexdigest()
    return ShardListing(shard, good - gone, bad - good - gone, gone, sealed_at > 0, state)
