"""The Ray task that seals a shard: it reads a few hundred records, which the driver has no time for.

This is a module of its own so that the process that Ray starts for the task imports nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from hv_batch.job.dataset.lost_media import release_lost
from hv_batch.job.dataset.seal import is_sealed, read_committed, seal_records
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.records.run_document import dataset_schema, read_run
from hv_batch.job.storage.store import Store


@ray.remote(num_cpus=0, max_retries=3)  # a repeated seal finds the first one's table and keeps it
def seal(
    store: Store, shard: int, keys: Sequence[str], extra_kinds: Mapping[str, ColumnType], webdataset: bool
) -> tuple[str, ...]:
    """Seal `shard` of the run in `store`; see `hv_batch.job.dataset.seal`.

    If files of committed samples are missing, the shard is not sealed. Returns the keys of these samples, which are
    pending again.
    """
    if is_sealed(store, shard):
        return ()
    records = read_committed(store, shard, keys)
    if lost := release_lost(store, shard, records):
        return lost
    run = read_run(store)
    facts = {"identity": run["identity"], "earlier": run.get("earlier", ()), "schema": dataset_schema(run)}
    seal_records(store, shard, records, extra_kinds, **facts, webdataset=webdataset)
    return ()
