"""The results of a run: the document of `summary.json`.

It is computed from the output root, shard by shard. It is available for a run in progress, a finished run, and a run
that was resumed on another machine, and no counter has to survive a crash. A sealed shard has stored its totals;
records are read only for shards that are open or have changed since they were sealed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from hv_batch.job.dataset.committed import committed_records
from hv_batch.job.dataset.shard_totals import ShardTotals, add_up, read_totals
from hv_batch.job.formatting import plural
from hv_batch.job.inspection.identity_counts import count_identities
from hv_batch.job.inspection.status import ShardStatus, read_status
from hv_batch.job.manifest.planned_keys import PlannedKeys
from hv_batch.job.records.run_document import read_run
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

SCHEMA = "hv_batch/summary/1"


def aggregate(store: Store) -> dict[str, Any]:
    """The document of `summary.json` for the whole root. Raises UserError if the root has no run.

    `stages` holds seconds: the sum, and the mean over the committed samples that report the stage.
    `denoise_gpu_seconds` is the sum of denoise seconds times the ranks of the group, null on a CPU. `embeddings` counts
    the prompts that were encoded for the committed samples, and those found in an encoder's memory. `truncated` counts
    the committed samples whose prompt or negative prompt is longer than the model reads, and the tokens it ignores.
    `looks` counts the committed samples that have scores by their look (`hv_batch.job.quality`); absent without scores.
    `identities` counts the committed samples by the identity that rendered them; absent if the root has had only one.
    `withdrawn` counts the samples that were withdrawn; absent if there are none.
    `failures` counts quarantined samples by class, `retries` the failed attempts of committed samples.
    """
    run, status = read_run(store), read_status(store)
    totals = ShardTotals()
    with_commits = [shard for shard in status.shards if shard.committed]
    for shard_totals in _totals(store, PlannedKeys(store, run), with_commits):
        totals.merge(shard_totals)
    failures: Counter[str] = Counter()
    for reason in status.reasons:
        failures[reason.kind] += reason.samples
    identities = count_identities(store, run, {shard.shard: shard.sealed for shard in with_commits})
    return {
        "schema": SCHEMA,
        "fingerprint": run["fingerprint"],
        "samples": status.samples,
        "committed": status.committed,
        "quarantined": status.quarantined,
        "pending": status.pending,
        **({"withdrawn": status.withdrawn} if status.withdrawn else {}),
        "shards": status.shard_count,
        "shards_sealed": status.sealed,
        "stages": {
            stage: {"seconds": total_ms / 1000, "mean_seconds": round(total_ms / totals.timed[stage] / 1000, 3)}
            for stage, total_ms in totals.stage_ms.items()
        },
        "denoise_gpu_seconds": _gpu_seconds(run, totals.denoise_ms),
        "embeddings": {"encoded": totals.embeddings["encoded"], "recalled": totals.embeddings["recalled"]},
        "truncated": {
            "prompts": totals.embeddings["truncated"],
            "negative_prompts": totals.embeddings["truncated_negative"],
            "tokens": totals.embeddings["tokens_lost"],
        },
        **({"identities": [asdict(each) for each in identities]} if identities else {}),
        **({"looks": dict(totals.looks)} if totals.looks else {}),
        "media": {
            "bytes": totals.bytes,
            "frames": totals.frames,
            "images": totals.images,
            "seconds": round(totals.footage_seconds(), 3),
        },
        "failures": dict(failures),
        "retries": dict(totals.retries),
    }


def describe_truncated(summary: Mapping[str, Any]) -> str:
    """One sentence about the truncated prompts of a summary; empty if there are none."""
    cut = summary.get("truncated", {})
    if not cut.get("tokens"):
        return ""
    return (
        f"the model does not read {cut['tokens']:,} tokens of long texts: {plural(cut['prompts'], 'prompt')} and "
        f"{plural(cut['negative_prompts'], 'negative prompt')} are truncated. Their records hold the numbers; shorten "
        "them if the ends matter"
    )


def _gpu_seconds(run: Mapping[str, Any], denoise_ms: Mapping[str, int]) -> float | None:
    """GPU seconds from `denoise_ms`, which is keyed by the ranks of a group; None on a CPU.

    The key is empty for records without the number of ranks. Such a run has one plan for all samples.
    """
    parallel = run["identity"]["parallel"]
    if parallel["device"] != "cuda":
        return None
    default_ranks = math.prod(parallel.get(degree, 1) for degree in ("ulysses_degree", "ring_degree", "cfg_degree"))
    return sum(milliseconds * int(ranks or default_ranks) for ranks, milliseconds in denoise_ms.items()) / 1000


def _totals(store: Store, planned: PlannedKeys, shards: Sequence[ShardStatus]) -> Iterator[ShardTotals]:
    """Yields the totals of each shard: the stored totals if they are valid, else the totals over its records."""
    stored_totals = map_in_threads(partial(_stored_totals, store), shards, store.readers)
    for shard, stored in zip(shards, stored_totals, strict=True):
        yield stored or add_up(committed_records(store, planned, [shard.shard]))


def _stored_totals(store: Store, shard: ShardStatus) -> ShardTotals | None:
    """The stored totals; None for an open shard, and if the number of records has changed since it was sealed."""
    totals = read_totals(store, shard.shard) if shard.sealed else None
    return totals if totals is not None and totals.committed == shard.committed else None
