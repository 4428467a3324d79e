"""What is left to render, and which shards are complete.

The look-ups in the output root are those of `shard_scan`, which the driver runs in a thread of its own. The bookkeeping
here does no I/O, except before the run begins. A shard is forgotten once it is sealed: however long the manifest, only
the shards between the oldest running sample and the newest are held (P7).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hv_batch.job import layout
from hv_batch.job.manifest.index import Index
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.manifest.selection import Selection, count_selected
from hv_batch.job.records.commits import find_shards
from hv_batch.job.records.quarantine import failed_keys, read_quarantined, release
from hv_batch.job.records.run_document import chosen_shards, read_run
from hv_batch.job.records.shard_scan import ShardScan, ShardScanner
from hv_batch.job.storage.store import Store


@dataclass(slots=True)
class SampleCounts:
    """Samples by state, of the shards that have been entered so far."""

    committed_before: int = 0  # found in the output root
    quarantined_before: int = 0
    withdrawn_before: int = 0
    committed: int = 0  # by this run
    quarantined: int = 0

    @property
    def terminal(self) -> int:
        before = self.committed_before + self.quarantined_before + self.withdrawn_before
        return before + self.committed + self.quarantined


@dataclass(slots=True)
class _OpenShard:
    keys: tuple[str, ...]  # in plan order; empty if samples outside this run are pending too
    pending: int  # of this run


@dataclass(frozen=True, slots=True)
class CompleteShard:
    """A shard whose last sample has become terminal."""

    shard: int
    keys: tuple[str, ...]


class PendingSamples:
    """The samples of a run that are not terminal yet.

    `scanner` looks shards up; pass each of its scans to `enter`, render `ShardScan.pending`, and report each of these
    samples by `committed` or `quarantined`. All methods must be called from one thread; the scanner may be used in
    another. Raises UserError for a selection that the manifest cannot fulfil.
    """

    def __init__(
        self, store: Store, index: Index, selection: Selection | None = None, *, keep_latents: bool = False
    ) -> None:
        self.counts = SampleCounts()
        self._store = store
        self._index = index
        self._keep_latents = keep_latents
        self._selection = selection or Selection()
        self._selected = count_selected(index, self._selection)
        self.scanner = ShardScanner(store, index, self._selection, self._selected, keep_latents=keep_latents)
        self._open: dict[int, _OpenShard] = {}
        self._complete: list[CompleteShard] = []
        self.unfinished: set[int] = set()  # the shards in which this run has written: some bytes for each

    def again(self) -> PendingSamples:
        """The samples of the same selection that are pending now, to be looked up anew."""
        return PendingSamples(self._store, self._index, self._selection, keep_latents=self._keep_latents)

    @property
    def total(self) -> int:
        """Samples of this run, terminal or not."""
        return sum(self._selected)

    @property
    def is_whole(self) -> bool:
        return self._selection.is_whole

    @property
    def takes_back(self) -> bool:
        """Whether the samples are quarantined ones, so that `take_back` must be called first."""
        return self._selection.failed is not None

    def take_back(self) -> int:
        """Make the selected samples that are quarantined pending again; how many. To be called before the scans."""
        taken = 0
        for shard, count in enumerate(self._selected):
            if count:
                keys = {sample.key for sample in self.scanner.selected_samples(shard)}
                given_up = read_quarantined(self._store, [shard])
                taken += release(self._store, (record for record in given_up if record["key"] in keys))
        return taken

    def enter(self, scan: ShardScan) -> None:
        """Count a shard that the run has come to, and keep track of it if something is left to do."""
        if scan.pending or (scan.keys and not scan.is_sealed):
            self.unfinished.add(scan.shard)
        self.counts.committed_before += scan.committed
        self.counts.quarantined_before += scan.quarantined
        self.counts.withdrawn_before += scan.withdrawn
        if scan.pending:
            self._open[scan.shard] = _OpenShard(scan.keys, len(scan.pending))
        elif scan.keys and not scan.is_sealed:
            self._complete.append(CompleteShard(scan.shard, scan.keys))

    def committed(self, sample: Sample) -> None:
        self.counts.committed += 1
        self._terminal(sample)

    def quarantined(self, sample: Sample) -> None:
        self.counts.quarantined += 1
        self._terminal(sample)

    def _terminal(self, sample: Sample) -> None:
        shard = self._open[sample.shard]
        shard.pending -= 1
        if shard.pending == 0:
            del self._open[sample.shard]
            if shard.keys:
                self._complete.append(CompleteShard(sample.shard, shard.keys))

    def take_complete(self) -> list[CompleteShard]:
        """The shards that have become complete since the last call, including those that a crash has left unsealed."""
        ready, self._complete = self._complete, []
        return ready


def only_failed(store: Store, selection: Selection) -> Selection:
    """Narrow a selection to the samples that are quarantined, or that were taken back and are not committed since.

    Raises UserError if the root holds no run, or no such shard.
    """
    chosen = {shard for shards in selection.shards for shard in shards}
    in_root = find_shards(store, chosen_shards(read_run(store), chosen or None), (layout.QUARANTINE, layout.RETRIED))
    failed = failed_keys(store, in_root)
    shards = tuple(range(shard, shard + 1) for shard in failed)
    return replace(selection, shards=shards, failed=frozenset().union(*failed.values()))
