"""Removes the seal of a shard."""

from __future__ import annotations

from hv_batch.job import layout
from hv_batch.job.records.unfinished_card import reopen_card
from hv_batch.job.storage.store import Store


def unseal_shard(store: Store, shard: int) -> None:
    """Remove `_SUCCESS` and then the seal of the shard, so that the run command processes its samples again.

    `_SUCCESS` must go first. A crash in between then leaves a complete run without `_SUCCESS`, and never a run that
    counts as finished although a shard is open. For the same reason the card is replaced before the seal is removed.
    So is what the report keeps of the sealed shard, which the reports of a run trust.
    """
    _delete(store, layout.SUCCESS)
    reopen_card(store)
    _delete(store, layout.report_digest_key(shard))
    for key_of in (layout.metadata_key, layout.totals_key, layout.lineage_key, layout.tar_key):
        _delete(store, key_of(shard))


def _delete(store: Store, key: str) -> None:
    if store.exists(key):  # on a versioned bucket, every delete of an absent object adds a delete marker
        store.delete(key)
