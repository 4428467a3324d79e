"""What is left to render, shard by shard, and when a shard is complete.

A shard is looked up in the output root a little before the run comes to it, many at a time because a store takes its
time to answer, and forgotten once it is sealed: however long the manifest, only the shards between the oldest running
sample and the newest are held (P7). Of a shard that is done, neither the samples nor the index are read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

from hv_batch.job import layout
from hv_batch.job.failure import Failure
from hv_batch.job.manifest.index import Index
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.manifest.selection import Selection, count_selected
from hv_batch.job.records.commits import ShardState, scan_shard
from hv_batch.job.records.latents import checkpointed, drop_latents, drop_steps
from hv_batch.job.records.quarantine import earlier_failures, failed_keys, read_quarantined, release, taken_back
from hv_batch.job.records.run_document import chosen_shards, read_run
from hv_batch.job.stages import Stage
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store

T = TypeVar("T")

LOOKERS = 32  # listings wait for the store, not for the CPU
LOOK_AHEAD = 64  # shards looked up before their turn; 1,000 shards a second of a store that answers in 60 ms
PASSED_AT_ONCE = 16  # sealed shards between two turns of the driver, which has other things to do


@dataclass(slots=True)
class SampleCounts:
    """Samples by how they stand, over the part of the manifest the plan has come to."""

    committed_before: int = 0  # found in the output root
    quarantined_before: int = 0
    committed: int = 0  # by this run
    quarantined: int = 0

    @property
    def terminal(self) -> int:
        return self.committed_before + self.quarantined_before + self.committed + self.quarantined


@dataclass(frozen=True, slots=True)
class Pending:
    """A sample that is to be rendered."""

    sample: Sample
    stage: Stage  # the stage at which it begins
    has_steps: bool  # an earlier run has left a step checkpoint of it
    earlier: tuple[Failure, ...] = ()  # what it had failed of when it was taken back


@dataclass(frozen=True, slots=True)
class ShardSkipped:
    """A shard with nothing left to render has been looked up, or the last of several."""

    shard: int


@dataclass(frozen=True, slots=True)
class StorageDown:
    """The output root does not answer; going on with the iteration asks it again."""

    error: StorageUnavailableError


@dataclass(frozen=True, slots=True)
class StorageUp:
    """After that, it does again."""


@dataclass(frozen=True, slots=True)
class _Found:
    """All that the plan asks of a shard, ahead of its turn: so an outage does not stop the run at its first sample."""

    state: ShardState
    taken_back: frozenset[str]  # keys


@dataclass(slots=True)
class _OpenShard:
    keys: tuple[str, ...]  # in plan order; none when other samples than those of this run are pending too
    pending: int  # of this run


@dataclass(frozen=True, slots=True)
class CompleteShard:
    """A shard whose last sample has become terminal."""

    shard: int
    keys: tuple[str, ...]


class PendingSamples:
    """Iterate it for the pending samples; tell it what became of each.

    `keep_latents` leaves alone what a crash between a commit and the removal of its latents has left behind. Raises
    UserError for a selection that the manifest cannot fulfil.
    """

    def __init__(
        self, store: Store, index: Index, selection: Selection | None = None, *, keep_latents: bool = False
    ) -> None:
        self.counts = SampleCounts()
        self._store = store
        self._index = index
        self._selection = selection or Selection()
        self._selected = count_selected(index, self._selection)
        self._keep_latents = keep_latents
        self._open: dict[int, _OpenShard] = {}
        self._complete: list[CompleteShard] = []
        self._pending = self._walk()

    @property
    def total(self) -> int:
        """Samples of this run, done or not."""
        return sum(self._selected)

    @property
    def is_whole(self) -> bool:
        return self._selection.is_whole

    @property
    def takes_back(self) -> bool:
        """Whether it is of samples that were given up, and `take_back` comes first."""
        return self._selection.failed is not None

    def take_back(self) -> int:
        """Make the selected samples pending that are quarantined; how many. Before the iteration begins."""
        taken = 0
        for shard, count in enumerate(self._selected):
            if count:
                keys = {sample.key for sample in self._inside(shard, self._index.samples(shard))}
                given_up = read_quarantined(self._store, [shard])
                taken += release(self._store, (record for record in given_up if record["key"] in keys))
        return taken

    def _inside(self, shard: int, everything: list[Sample]) -> list[Sample]:
        return list(islice(filter(self._selection.matches, everything), self._selected[shard]))

    def __iter__(self) -> Iterator[Pending | ShardSkipped | StorageDown | StorageUp]:
        return self._pending

    def _walk(self) -> Iterator[Pending | ShardSkipped | StorageDown | StorageUp]:
        # One listing for all shards: only what was running when a run ended has a step checkpoint.
        with_steps = yield from _persist(partial(checkpointed, self._store))
        passed = 0
        for shard, look in self._look_up(shard for shard, count in enumerate(self._selected) if count):
            found = yield from _persist(look)
            if found:
                state = found.state
                everything = yield from _persist(partial(self._index.samples, shard))
                inside = self._inside(shard, everything)
                yield from _persist(partial(self._clear, inside, state, with_steps))
                pending = self._enter(shard, state, everything, inside)
                if pending:
                    yield from self._begin(shard, pending, found, with_steps)
                else:  # it may have to be sealed
                    yield ShardSkipped(shard)
            else:
                self.counts.committed_before += self._selected[shard]
                passed += 1
                if passed % PASSED_AT_ONCE == 0:
                    yield ShardSkipped(shard)

    def _begin(
        self, shard: int, pending: list[Sample], found: _Found, with_steps: frozenset[str]
    ) -> Iterator[Pending | StorageDown | StorageUp]:
        keys = found.taken_back.intersection(sample.key for sample in pending)
        earlier = yield from _persist(partial(earlier_failures, self._store, shard, keys))
        for sample in pending:
            stage = Stage.DECODE if sample.key in found.state.latents else Stage.ENCODE
            yield Pending(sample, stage, sample.key in with_steps, earlier.get(sample.key, ()))

    def _look_up(self, shards: Iterator[int]) -> Iterator[tuple[int, Callable[[], _Found | None]]]:
        """Every shard in order, with a function for what the store knows of it: None when it is done and no more need
        be known.
        """
        pool = ThreadPoolExecutor(LOOKERS, thread_name_prefix="plan")
        ahead: deque[tuple[int, Future[_Found | None]]] = deque()
        try:
            ahead.extend((shard, pool.submit(self._scan, shard)) for shard in islice(shards, LOOK_AHEAD))
            while ahead:
                shard, found = ahead.popleft()
                yield shard, partial(self._found, shard, found)
                ahead.extend((shard, pool.submit(self._scan, shard)) for shard in islice(shards, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _found(self, shard: int, found: Future[_Found | None]) -> _Found | None:
        """What was found ahead of its turn; where the store did not answer then, it is asked again."""
        return self._scan(shard) if isinstance(found.exception(), StorageUnavailableError) else found.result()

    def _scan(self, shard: int) -> _Found | None:
        """Two requests tell that a shard is sealed and all its records are there, which of a resume is most of them.

        Latents and steps that a crash may have left in one are not looked for: `hv-batch gc` removes them.
        """
        is_sealed = self._store.exists(layout.metadata_key(shard))
        if is_sealed and len(layout.sample_keys(self._store.list(layout.commit_dir(shard)))) == self._index.size(shard):
            return None
        return _Found(scan_shard(self._store, shard, sealed=is_sealed), taken_back(self._store, shard))

    def _enter(self, shard: int, state: ShardState, everything: list[Sample], inside: list[Sample]) -> list[Sample]:
        """Take note of a shard that is not done, and return its samples to render."""
        terminal = state.committed | state.quarantined
        self.counts.committed_before += sum(sample.key in state.committed for sample in inside)
        self.counts.quarantined_before += sum(sample.key in state.quarantined for sample in inside)
        pending = [sample for sample in inside if sample.key not in terminal]
        left = sum(sample.key not in terminal for sample in everything)
        keys = tuple(sample.key for sample in everything) if left == len(pending) else ()
        if pending:
            self._open[shard] = _OpenShard(keys, len(pending))
        elif keys and not state.sealed:
            self._complete.append(CompleteShard(shard, keys))
        return pending

    def _clear(self, inside: list[Sample], state: ShardState, with_steps: frozenset[str]) -> None:
        """Remove what a crash between a record and its clearing away has left behind."""
        terminal = state.committed | state.quarantined
        for sample in inside:
            if sample.key in state.latents & terminal and not self._keep_latents:
                drop_latents(self._store, sample.shard, sample.key)
            if sample.key in with_steps & terminal:
                drop_steps(self._store, sample.shard, sample.key)

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
        """The shards that have become complete since the last call, including those a crash left unsealed."""
        ready, self._complete = self._complete, []
        return ready


def _persist(act: Callable[[], T]) -> Generator[StorageDown | StorageUp, None, T]:
    """What `act` on the output root returns, however often it takes. An exception would end the iteration for good."""
    was_away = False
    while True:
        try:
            result = act()
        except StorageUnavailableError as error:
            was_away = True
            yield StorageDown(error)
        else:
            if was_away:
                yield StorageUp()
            return result


def only_failed(store: Store, selection: Selection) -> Selection:
    """Of a selection, the samples that are quarantined, or were and have not been committed since they were taken back.

    Raises UserError when the root holds no run, or no such shard.
    """
    chosen = {shard for shards in selection.shards for shard in shards}
    found = failed_keys(store, chosen_shards(read_run(store), chosen or None))
    shards = tuple(range(shard, shard + 1) for shard in found)
    return replace(selection, shards=shards, failed=frozenset().union(*found.values()))
