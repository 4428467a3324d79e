"""Look shards up in the output root: what is left to render of each, and what is done.

A store takes its time to answer, so shards are looked up many at a time, and a bounded number ahead of the one that is
asked for: however long the manifest, only that many are held (P7). Of a shard that is done, only the
keys of its samples are read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from hv_batch.job import layout
from hv_batch.job.failure import Failure
from hv_batch.job.manifest.index import Index
from hv_batch.job.manifest.samples import Sample, group_by_lora
from hv_batch.job.manifest.selection import Selection
from hv_batch.job.records.commits import ShardState, scan_shard
from hv_batch.job.records.latents import checkpointed, drop_latents, drop_steps
from hv_batch.job.records.quarantine import earlier_failures, taken_back
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.records.withdrawn import all_withdrawn, remove_withdrawn
from hv_batch.job.stages import Stage
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

T = TypeVar("T")

LOOKERS = 32  # threads; listings wait for the store, not for the CPU
LOOK_AHEAD = 64  # shards looked up before their turn
FIRST_SHARDS = 256  # 65,536 samples at the default size; shards are rendered in order, so the first commits are here


class Retry(Protocol):
    """Calls an act on the output root until it succeeds, and returns its result."""

    def __call__(self, act: Callable[[], T], /) -> T: ...


def call_once(act: Callable[[], T], /) -> T:
    """Raises StorageUnavailableError if the output root does not answer."""
    return act()


def has_commits(store: Store, shards: int) -> bool:
    """Whether a sample of the first FIRST_SHARDS of these shards is committed. Stops at the first one."""
    folders = (layout.commit_dir(shard) for shard in range(min(shards, FIRST_SHARDS)))
    return any(map_in_threads(lambda folder: next(iter(store.list(folder)), None), folders, LOOKERS))


@dataclass(frozen=True, slots=True)
class Pending:
    """A sample that is to be rendered."""

    sample: Sample
    stage: Stage  # the stage at which it begins
    has_steps: bool  # an earlier run has left a step checkpoint of it
    earlier: tuple[Failure, ...] = ()  # its failures before it was taken back from the quarantine


@dataclass(frozen=True, slots=True)
class ShardScan:
    """What the output root holds of the selected samples of one shard."""

    shard: int
    committed: int = 0
    quarantined: int = 0
    withdrawn: int = 0
    pending: tuple[Pending, ...] = ()  # in the order of `group_by_lora`
    keys: tuple[str, ...] = ()  # of all samples of the shard; empty if one outside the selection is pending too
    is_sealed: bool = False


@dataclass(frozen=True, slots=True)
class _Records:
    """All that is read of a shard ahead of its turn, so that an outage does not stop the run at its first sample."""

    state: ShardState
    taken_back: frozenset[str]  # keys
    # Sealed with as many records as samples; then only `state.committed` and `state.withdrawn` have been read.
    may_be_done: bool = False


class ShardScanner:
    """Iterates over the selected shards of a run.

    `selected` has the number of selected samples of each shard. `keep_latents` leaves latents of terminal samples in
    place, which a crash may have left between a record and their removal.
    """

    def __init__(
        self, store: Store, index: Index, selection: Selection, selected: Sequence[int], *, keep_latents: bool = False
    ) -> None:
        self._store = store
        self._index = index
        self._selection = selection
        self._selected = selected
        self._keep_latents = keep_latents
        self._pool: ThreadPoolExecutor | None = None
        self._withdrawn: Mapping[int, frozenset[str]] = {}  # keys by shard

    def selected_samples(self, shard: int) -> list[Sample]:
        """Reads the index. Raises UserError if that is damaged."""
        return self._select(shard, self._index.samples(shard))

    def scans(self, retry: Retry = call_once) -> Iterator[ShardScan]:
        """Every selected shard, in order. Removes what a crash has left of samples that are terminal."""
        # One listing for all shards: only what was running when a run ended has a step checkpoint.
        with_steps = retry(partial(checkpointed, self._store))
        self._withdrawn = retry(partial(all_withdrawn, self._store))  # one listing too; nothing is withdrawn in a run
        for shard, look_up in self._look_up(shard for shard, count in enumerate(self._selected) if count):
            records = retry(look_up)
            if records.may_be_done:
                if retry(partial(self._index.keys, shard)) <= records.state.terminal:
                    gone = retry(partial(self._count_withdrawn, shard, records.state))
                    yield ShardScan(shard, committed=self._selected[shard] - gone, withdrawn=gone, is_sealed=True)
                    continue
                # A foreign object has made up the number.
                records = retry(partial(self._read_all, shard, is_sealed=True))
            yield self._scan(shard, records, with_steps, retry)

    def close(self) -> None:
        """Drop the look-ups that have not begun; the iteration then ends with a CancelledError."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _scan(self, shard: int, records: _Records, with_steps: frozenset[str], retry: Retry) -> ShardScan:
        everything = retry(partial(self._index.samples, shard))
        selected = self._select(shard, everything)
        state = records.state.of({sample.key for sample in everything})
        retry(partial(self._remove_remnants, selected, state, with_steps))
        if state.withdrawn:
            state = retry(partial(self._without_remnants, shard, state))
        terminal = state.terminal
        samples = [sample for sample in selected if sample.key not in terminal]
        pending_in_all = sum(sample.key not in terminal for sample in everything)
        if state.sealed and samples:  # a record was removed; the seal describes the video that it named
            retry(partial(unseal_shard, self._store, shard))
        keys = records.taken_back.intersection(sample.key for sample in samples)
        earlier = retry(partial(earlier_failures, self._store, shard, keys))

        def pending(sample: Sample) -> Pending:
            stage = Stage.DECODE if sample.key in state.latents else Stage.ENCODE
            return Pending(sample, stage, sample.key in with_steps, earlier.get(sample.key, ()))

        return ShardScan(
            shard,
            committed=sum(sample.key in state.committed for sample in selected),
            quarantined=sum(sample.key in state.quarantined for sample in selected),
            withdrawn=sum(sample.key in state.withdrawn for sample in selected),
            pending=tuple(map(pending, group_by_lora(samples, shard))),
            keys=tuple(sample.key for sample in everything) if pending_in_all == len(samples) else (),
            is_sealed=state.sealed and not samples,
        )

    def _select(self, shard: int, everything: list[Sample]) -> list[Sample]:
        return list(islice(filter(self._selection.matches, everything), self._selected[shard]))

    def _look_up(self, shards: Iterator[int]) -> Iterator[tuple[int, Callable[[], _Records]]]:
        """Every shard in order, with a function that returns what `_read` does and may be called again."""
        self._pool = pool = ThreadPoolExecutor(LOOKERS, thread_name_prefix="plan")
        ahead: deque[tuple[int, Future[_Records]]] = deque()
        try:
            ahead.extend((shard, pool.submit(self._read, shard)) for shard in islice(shards, LOOK_AHEAD))
            while ahead:
                shard, future = ahead.popleft()
                yield shard, partial(self._result, shard, future)
                ahead.extend((shard, pool.submit(self._read, shard)) for shard in islice(shards, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _result(self, shard: int, future: Future[_Records]) -> _Records:
        """What was read ahead of its turn. If the store did not answer then, it is asked again."""
        return self._read(shard) if isinstance(future.exception(), StorageUnavailableError) else future.result()

    def _read(self, shard: int) -> _Records:
        """Two requests for a shard that seems to be done, and most shards of a resume are.

        Latents and steps that a crash may have left in such a shard are not looked for: `hv-batch gc` removes them.
        """
        is_sealed = self._store.exists(layout.metadata_key(shard))
        if is_sealed:
            committed = layout.sample_keys(self._store.list(layout.commit_dir(shard)))
            withdrawn = self._withdrawn.get(shard, frozenset())
            # A record beside a tombstone is what a crash has left, so such a shard is not done.
            if len(committed | withdrawn) >= self._index.size(shard) and not committed & withdrawn:
                state = ShardState(committed, frozenset(), frozenset(), sealed=True, withdrawn=withdrawn)
                return _Records(state, frozenset(), may_be_done=True)
        return self._read_all(shard, is_sealed=is_sealed)

    def _read_all(self, shard: int, *, is_sealed: bool) -> _Records:
        return _Records(scan_shard(self._store, shard, sealed=is_sealed), taken_back(self._store, shard))

    def _count_withdrawn(self, shard: int, state: ShardState) -> int:
        """The number of selected samples that are withdrawn."""
        return sum(sample.key in state.withdrawn for sample in self.selected_samples(shard)) if state.withdrawn else 0

    def _without_remnants(self, shard: int, state: ShardState) -> ShardState:
        """Finish withdrawals that were killed. Returns the new state."""
        is_unsealed = remove_withdrawn(self._store, shard, state.withdrawn)
        return replace(state, sealed=state.sealed and not is_unsealed)

    def _remove_remnants(self, selected: list[Sample], state: ShardState, with_steps: frozenset[str]) -> None:
        """Remove what a crash between a record and the removal of latents or steps has left."""
        terminal = state.committed | state.quarantined
        for sample in selected:
            if sample.key in state.latents & terminal and not self._keep_latents:
                drop_latents(self._store, sample.shard, sample.key)
            if sample.key in with_steps & terminal:
                drop_steps(self._store, sample.shard, sample.key)
