"""Adds the digests of all shards up, in the order of the shards. The memory does not grow with the samples (P7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hv_batch.job import layout
from hv_batch.job.report.causes import Cause, add_causes
from hv_batch.job.report.facets import Facets, FacetSums, restrict
from hv_batch.job.report.pace import TimeBins
from hv_batch.job.report.spans import GAP_S, WorkSpan, merge_spans, unpack_spans
from hv_batch.job.report.spread import StageSpreads

MAX_SPANS = 4000  # of all workers
MAX_SHARD_VALUES = 200_000  # counts of facets by shard in the report; with more shards, it has those of the state only

COUNTS = ("samples", "committed", "quarantined", "withdrawn", "pending")
STATE_FACET = "state"


class ReportSums:
    """The sums over the digests that were added."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self.sealed = 0  # shards
        self.media: Counter[str] = Counter()
        self.media_seconds = 0.0
        self.gpu_seconds: Counter[str] = Counter()
        self.committed_at = TimeBins()
        self.quarantined_at = TimeBins()
        self.fingerprints: Counter[str] = Counter()
        self.causes: list[Cause] = []
        self.spreads = StageSpreads()
        self._facets = FacetSums()
        self._shards: list[dict[str, Any]] = []
        self._values = 0
        self._spans: list[WorkSpan] = []

    def add(self, digest: Mapping[str, Any]) -> None:
        self.counts.update({name: digest[name] for name in COUNTS})
        self.sealed += digest["sealed"]
        self.media.update(bytes=digest["media_bytes"], frames=digest["frames"])
        self.media_seconds += digest["media_seconds"]
        self.gpu_seconds.update(digest["gpu_seconds"])
        self.committed_at.add(digest["committed_at"])
        self.quarantined_at.add(digest["quarantined_at"])
        self.fingerprints.update(digest["fingerprints"])
        if digest["causes"]:
            self.causes = add_causes(self.causes, digest["causes"])
        self.spreads.add(digest["stage_ms"])
        self._facets.add(digest["facets"])
        self._add_shard(digest)
        if digest["work"]:
            self._spans += unpack_spans(digest["work"])
            if len(self._spans) > 2 * MAX_SPANS:
                self._spans = merge_spans(self._spans, MAX_SPANS, GAP_S)

    def _add_shard(self, digest: Mapping[str, Any]) -> None:
        shard, part_bytes, facets = digest["shard"], digest["part_bytes"], digest["facets"]
        self._values += sum(map(len, facets.values()))
        if self._values > MAX_SHARD_VALUES:
            facets = {name: counts for name, counts in facets.items() if name == STATE_FACET}
        has_part = part_bytes > 0
        self._shards.append(
            {
                "shard": shard,
                **{name: digest[name] for name in COUNTS},
                # Relative to report/, where the page is.
                "part": layout.report_part_key(shard).removeprefix("report/") if has_part else None,
                "bytes": part_bytes,
                "facets": facets,
            }
        )

    @property
    def is_finished(self) -> bool:
        """Whether no sample is pending and every shard is sealed, as in a root with `_SUCCESS`."""
        return self.counts["pending"] == 0 and self.sealed == len(self._shards)

    def facets(self) -> Facets:
        return self._facets.result()

    def shards(self, shown: Facets) -> list[dict[str, Any]]:
        """The lines of the shards, with the facets and values that the report shows."""
        return [{**line, "facets": restrict(line["facets"], shown)} for line in self._shards]

    def finished_at(self) -> TimeBins:
        """The times of all records."""
        both = TimeBins()
        for bins in (self.committed_at, self.quarantined_at):
            both.merge(bins)
        return both

    def spans(self) -> list[WorkSpan]:
        return merge_spans(self._spans, MAX_SPANS, GAP_S)
