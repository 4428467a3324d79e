"""The seal of a shard."""

from __future__ import annotations

from hv_batch.job import layout
from hv_batch.job.storage.store import Store


def unseal_shard(store: Store, shard: int) -> None:
    """Take back the seal of the run and then that of the shard, so that the run command looks at its samples again.

    In this order a crash in between leaves a run that is complete and says it is not, and never one that claims to be
    finished while a shard is open.
    """
    of_shard = (layout.metadata_key, layout.sums_key, layout.lineage_key, layout.tar_key)
    for key in (layout.SUCCESS, *(key_of(shard) for key_of in of_shard)):
        if store.exists(key):  # looking first spares versioned buckets a delete marker
            store.delete(key)
