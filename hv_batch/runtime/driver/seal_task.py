"""Sealing in a task of its own: a shard's records are a few hundred reads, and the driver must keep feeding.

A module of its own, too: the process that Ray takes for it imports this and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from hv_batch.job.dataset.seal import seal_shard
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.records.run_document import read_run
from hv_batch.job.storage.store import Store


@ray.remote(num_cpus=0, max_retries=3)  # a repeated seal finds the first one's table and leaves it
def seal(
    store: Store, shard: int, keys: Sequence[str], extra_kinds: Mapping[str, ColumnType], webdataset: bool
) -> None:
    """As `seal_shard`, with the run's own identity."""
    seal_shard(store, shard, keys, extra_kinds, identity=read_run(store)["identity"], webdataset=webdataset)
