"""What a run came to: the numbers of `summary.json`, and `report/index.html` to look at it.

Both are read from the records of the output root, shard by shard, so they can be made of a run that is under way,
finished or resumed on another machine. A record is read in milliseconds of a thread and stands for minutes of a GPU:
reading every one once more at the end costs nothing that matters, and so no counter has to survive a crash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from operator import itemgetter
from typing import Any

from hv_batch.job import gallery, layout
from hv_batch.job.commits import read_commit, read_quarantine, scan_shard
from hv_batch.job.runs import read_run
from hv_batch.job.status import read_status
from hv_batch.job.storage import Store

SCHEMA = "hv_batch/summary/1"
READERS = 16  # records are small: enough to hide an object store's latency, few enough to be polite to it
MAX_CARDS = 500  # a browser copes with that many clips on one page; the dataset itself is for the rest
MAX_FAILED = 200  # a traceback is up to 8 kB, and the hundredth says little new


def aggregate(store: Store) -> dict[str, Any]:
    """The document of `summary.json`, from every record of the root. Raises UserError when the root holds no run.

    `stages` are seconds, as sum and as mean over the committed samples that report the stage. `denoise_gpu_seconds` are
    the denoise seconds times the ranks of a group, null on a CPU. `failures` counts quarantined samples by class,
    `retries` the failed tries of samples that were committed all the same.
    """
    run, status = read_run(store), read_status(store)
    seconds: Counter[str] = Counter()
    timed: Counter[str] = Counter()  # samples that report the stage
    retries: Counter[str] = Counter()
    media: Counter[str] = Counter(bytes=0, frames=0)
    footage_s = 0.0
    for record in _committed(store, len(status.shards)):
        seconds.update(record["stages"])
        timed.update(record["stages"].keys())
        retries.update(failure["kind"] for failure in record["history"])
        media.update(bytes=record["bytes"], frames=record["produced"]["num_frames"])
        if record["produced"]["num_frames"] > 1:  # an image lasts no time
            footage_s += record["produced"]["num_frames"] / record["fps"]
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
            stage: {"seconds": round(total, 3), "mean_seconds": round(total / timed[stage], 3)}
            for stage, total in seconds.items()
        },
        "denoise_gpu_seconds": _gpu_seconds(run, seconds["denoise"]),
        "media": {**media, "seconds": round(footage_s, 3)},
        "failures": dict(Counter(record["class"] for record in _quarantined(store, len(status.shards)))),
        "retries": dict(retries),
    }


def _gpu_seconds(run: Mapping[str, Any], denoise_seconds: float) -> float | None:
    parallel = run["config"]["parallel"]
    if parallel["device"] != "cuda":
        return None
    ranks = parallel["ulysses_degree"] * parallel["ring_degree"] * parallel.get("cfg_degree", 1)  # a later key
    return round(denoise_seconds * ranks, 3)


def write_report(store: Store, summary: Mapping[str, Any]) -> None:
    """Write `report/index.html`: totals from `summary` (of `aggregate`), the first videos and the first failures."""
    shards = summary["shards"]
    videos = list(islice(_committed(store, shards), MAX_CARDS))
    failed = list(islice(_quarantined(store, shards), MAX_FAILED))
    name = store.url.rpartition("/")[2] or store.url
    store.put(layout.REPORT, gallery.page(name, read_run(store), summary, videos, failed).encode("utf-8"))


def _committed(store: Store, shards: int) -> Iterator[dict[str, Any]]:
    """Every commit record in plan order, one shard of them in memory."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="report") as pool:
        for shard in range(shards):
            keys = scan_shard(store, shard).committed
            records = pool.map(lambda key, shard=shard: read_commit(store, shard, key), keys)
            yield from sorted(records, key=itemgetter("row", "video_index"))


def _quarantined(store: Store, shards: int) -> Iterator[dict[str, Any]]:
    """Every quarantine record in plan order. There are few, or the run has other problems than the speed of this."""
    for shard in range(shards):
        records = [_read_quarantine(store, shard, key) for key in scan_shard(store, shard).quarantined]
        yield from sorted(filter(None, records), key=itemgetter("row", "video_index"))


def _read_quarantine(store: Store, shard: int, key: str) -> dict[str, Any] | None:
    try:
        return read_quarantine(store, shard, key)
    except FileNotFoundError:  # committed since the listing
        return None
