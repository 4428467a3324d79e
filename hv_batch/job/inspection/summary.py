"""What a run came to: the numbers of `summary.json`, and `report/index.html` to look at it.

Both are read from the output root, shard by shard, so they can be made of a run that is under way, finished or resumed
on another machine, and no counter has to survive a crash. A sealed shard has left its sums; records are read only of
shards that are open, or that have changed since.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

from hv_batch.job import layout
from hv_batch.job.dataset.shard_totals import ShardTotals, add_up, read_sums
from hv_batch.job.inspection import gallery
from hv_batch.job.inspection.status import ShardStatus, read_status
from hv_batch.job.records.commits import read_commit, scan_shard
from hv_batch.job.records.quarantine import read_quarantined
from hv_batch.job.records.run_document import read_run
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

SCHEMA = "hv_batch/summary/1"
MAX_CARDS = 500  # a browser copes with that many clips on one page; the dataset itself is for the rest
MAX_FAILED = 200  # a traceback is up to 8 kB, and the hundredth says little new


def aggregate(store: Store) -> dict[str, Any]:
    """The document of `summary.json`, of everything in the root. Raises UserError when the root holds no run.

    `stages` are seconds, as sum and as mean over the committed samples that report the stage. `denoise_gpu_seconds` are
    the denoise seconds times the ranks of each one's group, null on a CPU. `embeddings` counts the prompts that were
    encoded for the committed samples, and those that an encoder still held in memory. `failures` counts quarantined
    samples by class, `retries` the failed tries of samples that were committed all the same.
    """
    run, status = read_run(store), read_status(store)
    sums = ShardTotals()
    for of_shard in _sums(store, status.shards):
        sums.merge(of_shard)
    failures: Counter[str] = Counter()
    for reason in status.reasons:
        failures[reason.kind] += reason.samples
    return {
        "schema": SCHEMA,
        "fingerprint": run["fingerprint"],
        "samples": status.samples,
        "committed": status.committed,
        "quarantined": status.quarantined,
        "pending": status.pending,
        "shards": len(status.shards),
        "shards_sealed": status.sealed,
        "stages": {
            stage: {"seconds": total / 1000, "mean_seconds": round(total / sums.timed[stage] / 1000, 3)}
            for stage, total in sums.stage_ms.items()
        },
        "denoise_gpu_seconds": _gpu_seconds(run, sums.denoise_ms),
        "embeddings": {"encoded": sums.embeddings["encoded"], "recalled": sums.embeddings["recalled"]},
        "media": {"bytes": sums.bytes, "frames": sums.frames, "seconds": round(sums.footage_seconds(), 3)},
        "failures": dict(failures),
        "retries": dict(sums.retries),
    }


def _gpu_seconds(run: Mapping[str, Any], denoise_ms: Mapping[str, int]) -> float | None:
    """`denoise_ms` by the ranks of a group; a record that does not tell them is of a run that had one plan for all."""
    parallel = run["identity"]["parallel"]
    if parallel["device"] != "cuda":
        return None
    of_the_run = math.prod(parallel.get(degree, 1) for degree in ("ulysses_degree", "ring_degree", "cfg_degree"))
    return sum(milliseconds * int(ranks or of_the_run) for ranks, milliseconds in denoise_ms.items()) / 1000


def write_report(store: Store, summary: Mapping[str, Any]) -> None:
    """Write `report/index.html`: totals from `summary` (of `aggregate`), the first videos and the first failures."""
    shards = summary["shards"]
    videos = list(islice(_committed(store, range(shards)), MAX_CARDS))
    # As many as there are and no more: looking for the next would list every shard of a run that has none.
    failed = list(islice(read_quarantined(store, range(shards)), min(MAX_FAILED, summary["quarantined"])))
    name = public_url(store.url).rpartition("/")[2] or public_url(store.url)
    store.put(layout.REPORT, gallery.page(name, read_run(store), summary, videos, failed).encode("utf-8"))


def _sums(store: Store, shards: Sequence[ShardStatus]) -> Iterator[ShardTotals]:
    """Those of every shard: what sealing it wrote down, where it still holds, else from its records."""
    kept_sums = map_in_threads(partial(_kept_sums, store), shards, store.readers)
    for shard, kept in zip(shards, kept_sums, strict=True):
        yield kept or add_up(_committed(store, [shard.shard]))


def _kept_sums(store: Store, shard: ShardStatus) -> ShardTotals | None:
    """None for an open shard, and for one whose records have become more or fewer since it was sealed."""
    sums = read_sums(store, shard.shard) if shard.sealed else None
    return sums if sums is not None and sums.committed == shard.committed else None


def _committed(store: Store, shards: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Every commit record of `shards` in plan order, one shard of them in memory."""
    for shard in shards:
        keys = scan_shard(store, shard).committed
        records = map_in_threads(partial(read_commit, store, shard), keys, store.readers)
        yield from sorted(records, key=itemgetter("row", "video_index"))
