"""Iterate over the pending samples of a run in one thread."""

from __future__ import annotations

from collections.abc import Iterator

from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.records.shard_scan import Pending, Retry, call_once


def iterate(plan: PendingSamples, retry: Retry = call_once) -> Iterator[Pending]:
    """Scans the shards in order, enters each, and yields its pending samples."""
    for scan in plan.scanner.scans(retry):
        plan.enter(scan)
        yield from scan.pending
